"""Ten faults a user makes with a pipeline, each planted into a tiny run, each named before PPO or within its first iterations.

Beside each is the same run without the fault, which must not be named.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from harness import flags, run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlhf.data.collate import sft_batch
from rlhf.rollout import engines
from rlhf.rollout.sampling import Sampling

ONE = {"schedule__length": 1, "data__eval": "null", "checkpoint__every": 0}


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def copied(source: Path, place: Path) -> Path:
    return Path(shutil.copytree(source, place))


def said(stage: str, world: Path, place: Path, code: int, change=None, into: str = "", **more: object) -> str:
    """What a run logs that ends with the code; it writes into `place / stage`, or another directory there."""
    log = place / "log"
    log.unlink(missing_ok=True)
    assert run(stage, flags(stage, world, place / (into or stage), **more), log, change) == code, log.read_text()
    return log.read_text()


# ---- 1: another template -----------------------------------------------------------------------------------------------


def test_1_another_template(llamas, tmp_path):
    """The critic was trained on other marks between the turns than the actor writes."""
    critic = copied(llamas / "critic", tmp_path / "critic")
    assert "the template of the critic" not in said("ppo", llamas, tmp_path, 0, critic=critic, **ONE)
    tokenizer = AutoTokenizer.from_pretrained(critic)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(critic)
    assert "the template of the critic" in said("ppo", llamas, tmp_path, 65, into="other", critic=critic, **ONE)


# ---- 2: pad is EOS, and masked -----------------------------------------------------------------------------------------


def pad_is_eos(model: Path) -> None:
    for name, change in (("tokenizer_config.json", {"pad_token": "<|end|>"}), ("config.json", {"pad_token_id": 1})):
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))


def masked_by_id(module) -> None:
    """What a collator does that leaves every pad out of the loss by its id."""

    def batch(rows):
        kept = []
        for row in rows:
            trained = [t and i != 1 for i, t in zip(row.ids, row.trained, strict=True)]
            kept.append(type(row)(row.ids, trained, row.where))
        return sft_batch(kept)

    module.sft_batch = batch
    module.trained_tokens = lambda row: sum(t and i != 1 for i, t in zip(row.ids[1:], row.trained[1:], strict=True))


@pytest.mark.parametrize("masked", [True, False], ids=["masked by its id", "masked by its place"])
def test_2_pad_is_eos(masked, world, tmp_path):
    """Ours tells pads by their place and says so; after a trainer that tells them by their id no reply ends."""
    own = copied(world, tmp_path / "world")
    pad_is_eos(own / "model")
    learning = {"schedule__length": 80, "optimizer__lr": 1e-2, "batch_size": 18, "checkpoint__every": 0, "data__eval": "null"}
    log = said("sft", own, tmp_path, 0, masked_by_id if masked else None, **learning)
    assert "pad and end are one token, '<|end|>': masks tell them apart" in log
    of_ppo = ONE | {"actor": tmp_path / "sft", "critic": "zero", "rollout__max_new_tokens": 20}
    log = said("ppo", own, tmp_path, 0, **of_ppo)
    assert ("warning: no reply ended within rollout.max_new_tokens 20" in log) is masked
    assert ("where that is the pad token, too, some trainers mask it" in log) is masked


def test_2_no_row_teaches_the_end(world, tmp_path):
    """Every row is cut before its end."""
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a b", "completion": " c d e f g h"}] * 4)
    cut = ONE | {"data": rows, "data__max_length": 5, "data__too_long": "truncate", "batch_size": 4}
    warning = "the end token is trained in none of the rows"
    assert warning in said("sft", world, tmp_path, 0, **cut)
    assert warning not in said("sft", world, tmp_path, 0, into="whole", **cut | {"data__max_length": 9})


# ---- 3: a reward model of another tokenizer ----------------------------------------------------------------------------


def test_3_a_reward_model_of_another_tokenizer(llamas, tmp_path):
    other = copied(llamas / "critic", tmp_path / "other")
    told = "the tokenizer of the reward model"
    assert told not in said("ppo", llamas, tmp_path, 0, reward=other, **ONE)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(tokenizer))
    log = said("ppo", llamas, tmp_path, 0, into="other-ppo", reward=other, **ONE)
    assert f"{told} {other} is not the actor's: it reads replies as text" in log
    refused = said("ppo", llamas, tmp_path, 65, into="refused", reward=other, critic="null", **ONE)
    assert "set roles.critic to `zero`, or to a model that has the actor's" in refused


# ---- 4: the head is lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["reward", "critic"])
def test_4_the_head_is_lost(role, llamas, tmp_path):
    other = copied(llamas / "critic", tmp_path / "other")
    assert "score.weight" not in said("ppo", llamas, tmp_path, 0, into="whole", **ONE | {role: other})
    weights = load_file(other / "model.safetensors")
    assert weights.pop("score.weight").shape == (1, 32)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    log = said("ppo", llamas, tmp_path, 65, **ONE | {role: other})
    assert f"{other}" in log
    assert "score.weight" in log


# ---- 5: another temperature --------------------------------------------------------------------------------------------


def samples_at(temperature: float):
    """The sampler gets another temperature than the config and the update have."""

    def change(module) -> None:
        right = engines.NativeEngine.generate

        def generate(engine, prompts, sampling: Sampling, seeds):
            return right(engine, prompts, Sampling(sampling.max_new_tokens, temperature), seeds)

        engines.NativeEngine.generate = generate  # in the fork

    return change


def updates_at_one(module) -> None:
    right = module.ppo_loss
    module.ppo_loss = lambda policy, *a, **k: right(lambda batch, temperature, entropy: policy(batch), *a, **k)


@pytest.mark.parametrize(
    ("change", "named"),
    [(samples_at(1.0), "rollout log-probs"), (updates_at_one, "first ratio"), (samples_at(0.7), None)],
    ids=["in sampling", "in the update", "the same"],
)
def test_5_another_temperature(change, named, world, tmp_path):
    log = said("ppo", world, tmp_path, 0 if named is None else 1, change, rollout__temperature=0.7, **ONE)
    if named is None:
        assert "check FAILED" not in log
    else:
        assert f"check FAILED: {named}" in log
        assert "temperature" in log[log.rindex("likeliest causes") :]


# ---- 6: rewards negated ------------------------------------------------------------------------------------------------


def test_6_a_reward_model_of_exchanged_labels(world, tmp_path):
    """What was chosen when it was trained is rejected where it is evaluated; beside it they are the same."""
    pairs = [{"prompt": "a b", "chosen": f" c {letter}", "rejected": f" d {letter}"} for letter in "abcdefgh"] * 4
    exchanged = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    files = {"data": write(tmp_path / "pairs.jsonl", pairs), "data__eval": write(tmp_path / "exchanged.jsonl", exchanged)}
    learning = {"schedule__length": 40, "optimizer__lr": 1e-2, "checkpoint__every": 0}
    said("rm", world, tmp_path, 0, **learning, **files | {"data__eval": files["data"]}, into="right")
    log = said("ppo", world, tmp_path, 0, reward=tmp_path / "right", into="of the right", **ONE | {"critic": "zero"})
    assert "prefers the worse replies" not in log
    said("rm", world, tmp_path, 0, **learning, **files)
    rm = tmp_path / "rm"
    assert json.loads((rm / "run.json").read_text())["result"]["eval/accuracy_high"] < 0.5
    log = said("ppo", world, tmp_path, 1, reward=rm, **ONE | {"critic": "zero"})
    assert f"reward.source {rm}: prefers the worse replies" in log
    assert "`chosen` and `rejected` are exchanged" in log


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
@pytest.mark.parametrize("fault", ["in the function", "in the weight", "none", "it cannot tell"])
def test_6_a_reward_function_whose_sign_is_turned(fault, stage, world, tmp_path):
    """No figure of PPO shows it: that score rises, too. Pairs do."""
    sign, counted = -1 if fault == "in the function" else 1, "h" if fault == "it cannot tell" else "a"
    place = tmp_path / "reward.py"
    place.write_text(f"def of(responses):\n    return [{sign} * r.split().count('{counted}') for r in responses]\n")
    letters = "bcdefg"
    pairs = [{"prompt": "a b", "chosen": f" a {letter}", "rejected": f" {letter}", "note": "x"} for letter in letters] * 3
    more = ONE | {"reward": f"{place}:of", "reward__pairs": write(tmp_path / "pairs.jsonl", pairs)}
    if fault == "in the weight":
        more["reward__weight"] = -1
    wrong = fault.startswith("in the")
    log = said(stage, world, tmp_path, 1 if wrong else 0, **more)
    assert ("the reward prefers the worse replies: it scores the chosen reply higher in 0 of 18 pairs" in log) is wrong
    assert ("The sign of a source or of a weight is turned" in log) is wrong
    assert ("the reward scores the chosen reply higher in 18 of 18 pairs" in log) is (fault == "none")
    assert ("in 9 of 18 pairs" in log and "that is not told from a coin" in log) is (fault == "it cannot tell")
    if fault == "in the function":
        assert "--reward.gate false" in log
        said(stage, world, tmp_path, 0, **more, reward__gate="false")


# ---- 7: a learning rate that rises -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "told"), [(1e-2, True), (1e-3, False)])
def test_7_a_rising_learning_rate(lr, told, world, tmp_path):
    """A run that was stopped goes on with ten times the rate: after the warm-up's 0.03 it is 1 - 0.22 / 0.97 of its peak."""
    more = {"schedule__length": 4, "schedule__decay": "linear", "checkpoint__every": 1, "data__eval": "null"}
    said("ppo", world, tmp_path, 143, **more, max_hours=1e-9)
    log = tmp_path / "log"
    on = [*flags("ppo", world, tmp_path / "ppo", **more, optimizer__lr=lr), "--allow-inexact-resume"]
    assert run("ppo", on, log) == 0, log.read_text()
    assert ("ALARM rising learning rate in step 2: learning rate rose from 0.001 to 0.00773" in log.read_text()) is told


def test_7_nor_may_a_schedule_end_above_its_peak(world, tmp_path):
    assert "schedule.final" in said("ppo", world, tmp_path, 78, schedule__final=5)


# ---- 8: no KL penalty --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("coefficient", "told"), [(0, True), (0.05, False)])
def test_8_no_kl_penalty(coefficient, told, world, tmp_path):
    log = said("ppo", world, tmp_path, 0, kl__coef=coefficient, **ONE)
    assert ("warning: kl.coef is 0: nothing holds the policy near its reference" in log) is told


# ---- 9: truncated prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "code"), [("truncate", 0), ("fail", 65)])
def test_9_truncated_prompts(rule, code, world, tmp_path):
    rows = [{"prompt": "a b"}, {"prompt": "a b c d e f g h"}, {"prompt": "h g f e d c b a"}]
    more = ONE | {"data": write(tmp_path / "prompts.jsonl", rows), "data__too_long": rule}
    log = said("ppo", world, tmp_path, code, **more, data__max_length=6)
    told = "warning: 2 of 3 rows longer than 6 tokens truncated at the start: the policy does not see the beginning"
    assert (told in log) is (rule == "truncate")
    assert ("prompts.jsonl:2: 8 tokens, more than data.max_length 6" in log) is (rule == "fail")
    assert "tokens truncated" not in said("ppo", world, tmp_path, 0, **more, data__max_length=8, into="whole")


# ---- 10: shuffled labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [True, False])
def test_10_shuffled_labels(shuffled, world, tmp_path):
    """Which of two replies was chosen was drawn: the model learns nothing that holds for other pairs."""
    draw, pairs = random.Random(0), []
    for number in range(64):
        letters = "".join(draw.choices("bcdefgh", k=4))
        one, two = f" a {' '.join(letters[:2])}", f" {' '.join(letters[2:])} {letters[0]}"
        if shuffled and draw.random() < 0.5:
            one, two = two, one
        pairs.append({"prompt": f"a {letters[number % 4]}", "chosen": one, "rejected": two})
    files = {"data": write(tmp_path / "pairs.jsonl", pairs[:32]), "data__eval": write(tmp_path / "held_out.jsonl", pairs[32:])}
    said("rm", world, tmp_path, 0, **files, schedule__length=30, optimizer__lr=1e-2, checkpoint__every=0)
    rm = tmp_path / "rm"
    log = said("ppo", world, tmp_path, 1 if shuffled else 0, reward=rm, **ONE | {"critic": "zero"})
    assert (f"reward.source {rm}: no better than a coin at telling good replies from bad ones" in log) is shuffled
