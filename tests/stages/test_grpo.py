"""`rlhf grpo`, and what policy stages may have beside the clipped loss: it runs, resumes, agrees over processes, and learns."""

from __future__ import annotations

import json

import pytest
import torch
from broken import logprobs_shifted_by
from harness import before_each_step, flags, left, metrics, run, run_on_two
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ESTIMATORS = ("grpo", "rloo", "reinforce++", "reinforce++-baseline", "remax")
EXTRAS = {"ema_decay": 0.5, "kl__refresh_every": 2, "kl__refresh_keep": 0.25, "ptx__batch_size": 4, "ptx__coef": 0.5}


def extras(world) -> dict:
    return EXTRAS | {"ptx__file": world / "sft.jsonl"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_runs_to_a_model(estimator, world, tmp_path):
    log = tmp_path / "log"
    more = {"grpo__estimator": estimator, "schedule__length": 2}
    assert run("grpo", flags("grpo", world, tmp_path / "run", **more), log) == 0, log.read_text()
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["outputs"]) == {"model"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    first = metrics(tmp_path / "run")[1]
    assert first["policy/clip_fraction"] >= 0
    assert "value/loss" not in first


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_what_follows_the_actor_resumes_to_the_bit(stage, world, tmp_path):
    """Stopped after step 3, gone on with: model, average, reference and metrics are those of a run that was not."""
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    more = extras(world) | ({"grpo__resample": 2} if stage == "grpo" else {})

    def stop(train) -> None:
        if train.step_done == 3:
            raise SystemExit(1)

    assert run(stage, flags(stage, world, whole, **more), log) == 0, log.read_text()
    assert run(stage, flags(stage, world, cut, **more), log, before_each_step(stop)) != 0
    assert run(stage, flags(stage, world, cut, **more), log) == 0, log.read_text()
    assert left(whole, 4) == left(cut, 4)
    assert (whole / "ema" / "model.safetensors").read_bytes() == (cut / "ema" / "model.safetensors").read_bytes()
    assert {"ema", "reference"} <= {file.stem for file in (whole / "checkpoints" / "step-4").glob("*.safetensors")}


def test_the_average_and_the_reference_by_hand(world, tmp_path):
    """From the checkpoints of single steps: ema_t = d ema_{t-1} + (1 - d) actor_t, and a reference moved every second one."""
    log, output = tmp_path / "log", tmp_path / "run"
    assert run("grpo", flags("grpo", world, output, checkpoint__keep=9, **extras(world)), log) == 0, log.read_text()
    start = {
        f"actor.{name}": p.detach() for name, p in AutoModelForCausalLM.from_pretrained(world / "model").named_parameters()
    }
    average, reference = start, start
    for step in range(1, 5):
        at = output / "checkpoints" / f"step-{step}"
        actor = load_file(at / "model.safetensors")
        average = {name: 0.5 * average[name] + 0.5 * actor[name] for name in actor}
        if step % 2 == 0:
            reference = {name: 0.25 * reference[name] + 0.75 * actor[name] for name in actor}
        for found, expected in (("ema", average), ("reference", reference)):
            kept = load_file(at / f"{found}.safetensors")
            assert kept.keys() == expected.keys()
            assert all(torch.allclose(kept[name], expected[name], atol=1e-7) for name in kept), (step, found)
    assert any((average[name] - start[name]).abs().max() > 1e-4 for name in start)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_two_processes_are_one(stage, world, tmp_path):
    log = tmp_path / "log"
    more = extras(world) | {"precision": "fp64", f"{stage}__entropy_coef": 0.01, "kl__place": "loss", "kl__estimator": "k3"}
    more |= {"grpo__resample": 1, "grpo__estimator": "rloo"} if stage == "grpo" else {}
    assert run(stage, flags(stage, world, tmp_path / "one", **more), log) == 0, log.read_text()
    assert run_on_two(stage, flags(stage, world, tmp_path / "two", **more), log) == [0, 0], log.read_text()
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-7, abs=1e-9)


def test_ptx_loss_is_that_of_its_rows(world, tmp_path):
    """With a learning rate next to nothing, the mean over one pass of the file is the SFT loss of the model there."""
    log = tmp_path / "log"
    tiny = {"optimizer__lr": 1e-12, "schedule__length": 1, "checkpoint__every": 0}
    whole = {"ptx__file": world / "sft.jsonl", "ptx__batch_size": 37, "grpo__minibatch_size": 21, "grpo__epochs": 1}
    assert run("grpo", flags("grpo", world, tmp_path / "mixed", **tiny, **whole), log) == 0, log.read_text()
    assert run("sft", flags("sft", world, tmp_path / "sft", batch_size=37, **tiny), log) == 0, log.read_text()
    found = next(line["ptx/loss"] for line in metrics(tmp_path / "mixed") if "ptx/loss" in line)
    assert found == pytest.approx(metrics(tmp_path / "sft")[0]["eval/loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_estimator_learns_and_unlearns(estimator, seed, world, tmp_path):
    """The task of the unit-test mode: the reward is how often one token occurs; negated, it must fall."""
    log = tmp_path / "log"
    more = {"grpo__estimator": estimator, "seed": seed, "schedule__length": 12, "schedule__decay": "constant",
            "schedule__warmup": 0, "optimizer__lr": 3e-3, "rollout__batch_size": 16, "rollout__samples_per_prompt": 4,
            "rollout__max_new_tokens": 12, "grpo__minibatch_size": 32, "grpo__epochs": 2, "micro_batch_size": 32,
            "kl__coef": 0.02, "reward__missing_eos": "none", "checkpoint__every": 0, "data__eval": "null"}  # fmt: skip
    scores = {}
    for weight in (1, -1):
        output = tmp_path / f"run{weight}"
        assert run("grpo", flags("grpo", world, output, reward__weight=weight, **more), log) == 0, log.read_text()
        scores[weight] = [line["reward/score"] for line in metrics(output)]
    assert sum(scores[1][-3:]) / 3 > scores[1][0] + 1.0, scores
    assert sum(scores[-1][-3:]) / 3 < scores[-1][0] / 2, scores


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_weights_that_ranks_divide(engine, llamas, tmp_path):
    """A moving reference, an average and a mixed-in loss, in two processes that divide the weights, are those of one."""
    log = tmp_path / "log"
    more = extras(llamas) | {"kl__place": "loss", "kl__estimator": "k3"}
    assert run("ppo", flags("ppo", llamas, tmp_path / "one", **more), log) == 0, log.read_text()
    two = flags("ppo", llamas, tmp_path / "two", **more)
    assert run_on_two("ppo", two, log, engine=engine) == [0, 0], log.read_text()
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
    averages = [load_file(tmp_path / name / "ema" / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(averages[0][name], averages[1][name], atol=1e-4) for name in averages[0])


def test_the_average_of_adapters_is_merged_as_well(world, tmp_path):
    """And lies between the start and the end, where the adapter itself was merged into the model."""
    log = tmp_path / "log"
    more = {"lora__rank": 4, "lora__merge": "true", "ema_decay": 0.5, "optimizer__lr": 1e-2}
    assert run("grpo", flags("grpo", world, tmp_path / "run", **more), log) == 0, log.read_text()
    start = AutoModelForCausalLM.from_pretrained(world / "model").state_dict()
    model, average = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).state_dict() for name in ("model", "ema"))
    moved, lagging = (sum(float((found[name] - start[name]).norm()) for name in start) for found in (model, average))
    assert 0.1 * moved < lagging < 0.95 * moved


@pytest.mark.slow
def test_the_average_of_divided_adapters_is_merged(llamas, tmp_path):
    log = tmp_path / "log"
    more = {"lora__rank": 4, "lora__merge": "true", "ema_decay": 0.5, "optimizer__lr": 1e-2}
    assert run("grpo", flags("grpo", llamas, tmp_path / "one", **more), log) == 0, log.read_text()
    assert run_on_two("grpo", flags("grpo", llamas, tmp_path / "two", **more), log, engine="fsdp") == [0, 0], log.read_text()
    one, two = (load_file(tmp_path / name / "ema" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert json.loads((tmp_path / "two" / "ema" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_checks_are_not_lost_with_a_minibatch_without_scores(world, tmp_path):
    """The first minibatch has no reply with a score; that sampling and scoring disagree is said all the same."""
    (tmp_path / "late.py").write_text("def late(where):\n    return [None] * len(where)\n")

    more = {"reward": f"{tmp_path}/late.py:late", "data__eval": "null"}
    assert run("grpo", flags("grpo", world, tmp_path / "run", **more), tmp_path / "log", logprobs_shifted_by(5.0)) == 1
    assert "rollout log-probs" in (tmp_path / "log").read_text()
