"""Runs whose policy goes wrong say so, with a reply; one that is to pause is saved, stops, and goes on to the same bits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness import flags, left, metrics, run, run_on_two
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rlhf.config.parse import parse
from rlhf.config.schema import PpoConfig
from rlhf.errors import RlhfError
from rlhf.report.html.gather import gather
from rlhf.rollout.ngrams import repeated
from rlhf.runs.manifest import read_status

STEPS = 5
WRONG = {"alarms__window": 1, "alarms__kl_budget": 0.5, "alarms__repeated": 0, "optimizer__lr": 3e-3, "schedule__length": STEPS,
         "schedule__decay": "constant", "reward__missing_eos": "none", "rollout__max_new_tokens": 16,
         "checkpoint__every": 2}  # fmt: skip
"""A count of one letter is a reward for longer replies that repeat it."""


def said(output: Path) -> list[dict]:
    file = output / "alarms.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def noted(world, tmp_path_factory):
    """The directory of a run that goes wrong and goes on, beside its log; each made once."""
    made: dict[str, Path] = {}

    def of(stage: str) -> Path:
        if stage not in made:
            output = made[stage] = tmp_path_factory.mktemp("noted") / stage
            log = output.with_name("log")
            assert run(stage, flags(stage, world, output, **WRONG), log) == 0, log.read_text()
        return made[stage]

    return of


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_it_is_said_with_a_reply_and_recorded(stage, noted):
    output = noted(stage)
    log, records = output.with_name("log").read_text(), said(output)
    assert {"KL budget", "repetition"} <= {record["alarm"] for record in records}
    for record in records:
        name, step = record["alarm"], record["step"]
        assert f"{stage}  ALARM {name} in step {step}: {record['words']}; see `rlhf explain {name!r}`" in log
        assert f"{record['prompt']!r} -> {record['reply']!r}" in log
    (first, *_) = [record for record in records if record["alarm"] == "KL budget"]
    measured = next(line["kl/sequence"] for line in metrics(output) if line.get("kl/sequence", 0) > 0.5)
    assert first["words"].startswith(f"KL from the reference is {measured:.3g} nats a reply, the budget is 0.5; reward/score")
    (repetition, *_) = [record["reply"].split() for record in records if record["alarm"] == "repetition"]
    assert repeated(repetition) > 0  # of all replies the one that repeats most
    warned = [finding.text for finding in gather(output).findings if finding.level == "warn"]
    assert any(text.startswith("Alarm repetition (rlhf explain 'repetition') in step") for text in warned)


def test_the_prompt_that_is_shown_is_that_of_the_reply(world, tmp_path):
    """By what the run recorded of its rollouts; that of the first row would be another."""
    output = tmp_path / "ppo"
    assert run("ppo", [*flags("ppo", world, output, **WRONG), "--rollout.record"], tmp_path / "log") == 0
    tokenizer, others = AutoTokenizer.from_pretrained(world / "model"), 0
    for record in said(output):
        rows = load_file(output / "rollouts" / f"step-{record['step']}.safetensors")
        texts = [
            [tokenizer.decode(ids[:length]) for ids, length in zip(rows[name], lengths.tolist(), strict=True)]
            for name, lengths in (("prompts", rows["prompt_lengths"]), ("tokens", rows["mask"].sum(1)))
        ]
        assert (record["prompt"], record["reply"]) in zip(*texts, strict=True)
        others += record["prompt"] != texts[0][0]
    assert others > 0


@pytest.mark.parametrize("warmup", [0.5, 0.0])
def test_a_rate_that_rises_in_its_warm_up_is_no_alarm(warmup, world, tmp_path):
    """Half of four steps. Without a warm-up nothing rises either."""
    output, log = tmp_path / "ppo", tmp_path / "log"
    more = {"schedule__length": 4, "schedule__warmup": warmup, "alarms__window": 1, "alarms__kl_budget": 1000}
    assert run("ppo", flags("ppo", world, output, **more), log) == 0, log.read_text()
    rates = [line["optimizer/lr"] for line in metrics(output) if "optimizer/lr" in line]
    assert (rates[1] > rates[0]) is (warmup > 0)
    assert "rising learning rate" not in {record["alarm"] for record in said(output)}


def test_with_usual_limits_nothing_is_said_of_a_short_run(world, tmp_path):
    assert run("ppo", flags("ppo", world, tmp_path / "ppo"), tmp_path / "log") == 0
    assert said(tmp_path / "ppo") == []
    assert "ALARM" not in (tmp_path / "log").read_text()


def test_none_says_nothing(world, tmp_path):
    more = WRONG | {"alarms__action": "none", "schedule__length": 2}
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", **more), tmp_path / "log") == 0
    assert (said(tmp_path / "ppo"), "ALARM" in (tmp_path / "log").read_text()) == ([], False)


def paused_and_noted(stage: str, world: Path, output: Path, processes: int) -> list[int]:
    """Steps at which the run paused; started again and again, at last with action note."""

    def start(action: str) -> list[int]:
        arguments = flags(stage, world, output, **WRONG, alarms__action=action)
        return [run(stage, arguments, log)] if processes == 1 else run_on_two(stage, arguments, log)

    log, paused = output.with_name("log"), []
    for _ in range(2):
        assert start("pause") == [76] * processes, log.read_text()
        assert (status := read_status(output)) is not None
        assert (status["state"], status["exit_code"]) == ("preempted", 76)
        message = log.read_text()[log.read_text().rindex("rlhf: error:") :]
        step = int(re.findall(r"paused by an alarm in step (\d+)\. ", message)[0])
        assert "run the same command again to go on" in message
        assert (output / "checkpoints" / f"step-{step}").is_dir()
        assert step == max(line["step"] for line in metrics(output))
        paused.append(step)
    assert start("note") == [0] * processes, log.read_text()
    return paused


def test_it_pauses_and_goes_on_to_the_same_bits(world, noted, tmp_path):
    output = tmp_path / "ppo"
    steps = paused_and_noted("ppo", world, output, processes=1)
    assert steps == sorted({record["step"] for record in said(noted("ppo"))})[:2]
    assert said(output) == said(noted("ppo"))
    whole, own = left(noted("ppo"), steps=4), left(output, steps=4)
    assert own == whole


@pytest.mark.slow
def test_two_processes_pause_together(world, noted, tmp_path):
    steps = paused_and_noted("grpo", world, tmp_path / "grpo", processes=2)
    assert steps == sorted({record["step"] for record in said(noted("grpo"))})[:2]
    named = [(record["step"], record["alarm"]) for record in said(tmp_path / "grpo")]
    assert named == [(record["step"], record["alarm"]) for record in said(noted("grpo"))]


def test_an_alarm_in_the_last_step_pauses_nothing(world, tmp_path):
    more = WRONG | {"alarms__action": "pause", "schedule__length": 2}
    log = tmp_path / "log"
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", **more), log) == 0, log.read_text()
    assert {record["step"] for record in said(tmp_path / "ppo")} == {2}


# ---- a gold metric ---------------------------------------------------------------------------------------------------


def gold(world: Path, place: Path, sign: int) -> dict[str, object]:
    """A scorer that counts the letter for which the reward is."""
    (place / "scorer.py").write_text(f"def judge(responses):\n    return [{sign} * r.split().count('a') for r in responses]\n")
    scorer = {"eval__scorers": f"{place}/scorer.py:judge", "eval__every": 1, "alarms__gold": "judge"}
    return {**WRONG, **scorer, "eval__samples_per_prompt": 8, "alarms__kl_budget": 1000, "alarms__repeated": 1}


@pytest.mark.parametrize("sign", [-1, 1])
def test_what_should_rise_with_the_reward_and_falls(sign, world, tmp_path):
    output, log = tmp_path / "ppo", tmp_path / "log"
    assert run("ppo", flags("ppo", world, output, **gold(world, tmp_path, sign)), log) == 0, log.read_text()
    told = [record["words"] for record in said(output) if record["alarm"] == "gold falls"]
    assert len(told) == (sign < 0)
    if told:
        assert told[0].startswith("judge fell in 3 evaluations in a row, from -")


@pytest.mark.parametrize(("stage", "sign"), [("ppo", -1), ("grpo", -1), ("grpo", 1)])
def test_the_evaluation_after_the_last_step_is_looked_at(sign, stage, world, tmp_path):
    """Before the first step, after two, after four, and after the fifth, which two does not divide."""
    output, log = tmp_path / stage, tmp_path / "log"
    more = gold(world, tmp_path, sign) | {"eval__every": 2}
    counting = f"calls = []\n\ndef judge(responses):\n    calls.append(1)\n    return [{sign} * len(calls)] * len(responses)\n"
    (tmp_path / "scorer.py").write_text(counting)
    assert run(stage, flags(stage, world, output, **more), log) == 0, log.read_text()
    assert [record["step"] for record in said(output) if record["alarm"] == "gold falls"] == ([5] if sign < 0 else [])


def test_a_gold_metric_that_nobody_gives(world, tmp_path):
    log, more = tmp_path / "log", gold(world, tmp_path, 1) | {"alarms__gold": "jugde"}
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", **more), log) == 78
    assert (
        "alarms.gold: no scorer of eval.scorers gives jugde; what is measured is score, length, ended, judge" in log.read_text()
    )


def test_gold_needs_evaluations(world, tmp_path):
    with pytest.raises((RlhfError, ValidationError), match=r"alarms\.gold needs data\.eval, eval\.every and eval\.scorers"):
        parse("ppo", flags("ppo", world, tmp_path, alarms__gold="judge"))


def test_no_alarm_is_part_of_what_a_run_goes_on_with():
    """They say when to stop, not what is computed: another limit is no other run."""
    from rlhf.runs.lineage import OUTPUT_FIELDS

    assert "alarms" in OUTPUT_FIELDS
    assert "alarms" in PpoConfig.model_fields
