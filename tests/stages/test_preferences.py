"""DPO and KTO whole: what they start from, what they learn, and the reference they are measured from."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal

import pytest
from harness import before_each_step, flags, metrics, run, run_on_two
from test_equivalence import losses

from rlhf.cli import main
from rlhf.training.reference import ReferenceLogprobs

ALONE = {"data__eval": "null", "checkpoint__every": 0}
LONGER = {"schedule__length": 12, "optimizer__lr": 1e-2, "checkpoint__every": 0}


def test_dpo_starts_at_its_reference_and_learns_the_order(world, tmp_path):
    log = tmp_path / "log"
    assert run("dpo", flags("dpo", world, tmp_path / "dpo", **LONGER), log) == 0, log.read_text()
    first, *_, last, evaluated = metrics(tmp_path / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (first["accuracy"], first["margin"], first["drift"]) == (0.5, 0.0, 0.0)
    assert last["loss"] < 0.5
    assert last["reward/chosen"] > last["reward/rejected"]
    assert evaluated["eval/accuracy"] > 0.9  # the pairs are separable by their first word
    assert evaluated["eval/accuracy_low"] < evaluated["eval/accuracy"] <= evaluated["eval/accuracy_high"]
    assert json.loads((tmp_path / "dpo" / "run.json").read_text())["result"]["eval/pairs"] == 37


@pytest.mark.parametrize(("kind", "start"), [("ipo", 25.0), ("simpo", None), ("orpo", None)])
def test_other_losses_learn_it_too(kind, start, world, tmp_path):
    log = tmp_path / "log"
    assert run("dpo", flags("dpo", world, tmp_path / "dpo", **LONGER, loss__kind=kind), log) == 0, log.read_text()
    first, *_, last, evaluated = metrics(tmp_path / "dpo")
    assert start is None or first["loss"] == pytest.approx(start)  # (0 - 1 / (2 beta))^2
    assert last["loss"] < first["loss"]
    assert evaluated["eval/accuracy"] > 0.9
    assert ("drift" in last) == ("reference log-probabilities" in log.read_text()) == (kind == "ipo")


@pytest.mark.parametrize("data", ["rated", "pairs"])
def test_kto_learns_from_rated_replies_and_from_pairs(data, world, tmp_path):
    log, output = tmp_path / "log", tmp_path / "kto"
    assert run("kto", flags("kto", world, output, **LONGER, data=world / f"{data}.jsonl"), log) == 0, log.read_text()
    first, *_, last, evaluated = metrics(output)
    assert first["loss"] == pytest.approx(0.5, abs=1e-7)
    assert (first["drift"], first["baseline"]) == (0.0, 0.0)
    assert last["loss"] < 0.45
    assert evaluated["eval/reward/desirable"] > evaluated["eval/reward/undesirable"]
    assert evaluated["eval/replies"] == 74


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_policy_that_is_not_its_reference_at_the_first_step_is_told(stage, world, tmp_path):
    def shifted(_) -> None:
        right = ReferenceLogprobs._computed
        ReferenceLogprobs._computed = lambda *given: [[x + 1e-6 for x in row] for row in right(*given)]  # in the fork

    log = tmp_path / "log"
    assert run(stage, flags(stage, world, tmp_path / stage, **ALONE), log, shifted) == 1
    assert "drift at step 0" in log.read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reference_of_its_own_gives_what_the_policy_itself_would(processes, world, tmp_path):
    """The same weights at another place; so the second model is computed as the first is."""
    log, copy = tmp_path / "log", tmp_path / "copy"
    shutil.copytree(world / "model", copy)
    outputs = []
    for more in ({}, {"model__reference": copy}):
        outputs.append(tmp_path / f"run{len(outputs)}")
        arguments = flags("dpo", world, outputs[-1], **ALONE, **more)
        codes = [run("dpo", arguments, log)] if processes == 1 else run_on_two("dpo", arguments, log)
        assert set(codes) == {0}, log.read_text()
    one, two = map(metrics, outputs)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    inputs = json.loads((outputs[1] / "run.json").read_text())["inputs"]
    assert inputs["model.reference"]["digest"] == inputs["model"]["digest"]


def test_only_what_a_run_will_see_is_scored_and_that_once(world, tmp_path):
    """Two steps of nine pairs; what goes on takes the numbers of the checkpoint, and refuses to where the rows have changed."""
    log, output, data = tmp_path / "log", tmp_path / "dpo", tmp_path / "pairs.jsonl"
    shutil.copy(world / "pairs.jsonl", data)
    arguments = flags("dpo", world, output, data=data, data__eval="null", schedule__length=2)
    killed = before_each_step(lambda train: train.step_done and os.kill(os.getpid(), signal.SIGKILL))
    assert run("dpo", arguments, log, killed) == -signal.SIGKILL
    assert "reference log-probabilities of 18 rows" in log.read_text()
    log.unlink()
    data.write_text("".join(data.read_text().splitlines(keepends=True)[::-1]))
    assert run("dpo", [*arguments, "--allow-inexact-resume"], log) == 65
    assert "reference log-probabilities of other training rows" in log.read_text()
    shutil.copy(world / "pairs.jsonl", data)
    assert run("dpo", [*arguments, "--allow-inexact-resume"], log) == 0, log.read_text()
    assert "reference log-probabilities of 18 rows" not in log.read_text()


def test_a_pipeline_has_dpo_after_sft(world, tmp_path, capsys):
    for stage in ("sft", "dpo"):
        (tmp_path / f"{stage}.yaml").write_text("schedule: {length: 1, unit: steps}\n")
    (tmp_path / "pipeline.yaml").write_text(
        f"output: {tmp_path}/all\nstages:\n"
        f"  sft: {{config: sft.yaml, model: {world}/model, data: {world}/sft.jsonl}}\n"
        f"  dpo: {{config: dpo.yaml, model: sft, data: {world}/pairs.jsonl}}\n"
    )
    assert main(["run", str(tmp_path / "pipeline.yaml"), "--dry-run", "--json", "--dpo.loss.kind", "ipo"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["stage"] for plan in plans] == ["sft", "dpo"]
    assert plans[1]["config"]["model"] == {"path": f"{tmp_path}/all/sft", "reference": None}
    assert plans[1]["config"]["loss"]["kind"] == "ipo"
