"""How roles share weights, in whole runs: what is in memory, what is trained and saved, and that the numbers are the same."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from harness import flags, fork, metrics, run, run_on_two, stage_module, wait
from pydantic import ValidationError
from safetensors.torch import load_file
from test_equivalence import fixed_rollouts, losses

from rlhf.config.parse import parse
from rlhf.config.schema import PpoConfig
from rlhf.errors import DataError
from rlhf.models.load import Loading, load_actor, load_scalar
from rlhf.training.session import Training
from rlhf.training.unit_test import unit_test

SHORT = {"schedule__length": 3, "checkpoint__every": 0, "data__eval": "null"}


def steps(output) -> list[dict]:
    return [line for line in metrics(output) if "optimizer/grad_norm" in line]


@pytest.mark.parametrize("dora", ["false", "true"])
def test_adapters_are_separate_models(dora, llamas, reward, tmp_path):
    """Three iterations on fixed rollouts: one base computes what four models with the same adapters do."""
    log, found = tmp_path / "log", []
    for mode in ("separate", "adapters"):
        more = {"roles__mode": mode, "critic": "zero", "reward": reward, "lora__rank": 2, "lora__dora": dora, **SHORT}
        arguments = flags("ppo", llamas, tmp_path / mode, precision="fp64", **more)
        assert run("ppo", arguments, log, fixed_rollouts) == 0, log.read_text()
        found.append(steps(tmp_path / mode))
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("merge", ["false", "true"])
def test_a_run_of_adapters(merge, llamas, reward, tmp_path):
    """Sampled by the actor, saved so that the next stage opens it; frozen adapters are in no checkpoint."""
    log = tmp_path / "log"
    sft = flags("sft", llamas, tmp_path / "sft", lora__rank=4, schedule__length=2, optimizer__lr=1e-2, data__eval="null")
    assert run("sft", sft, log) == 0, log.read_text()
    more = {"actor": tmp_path / "sft", "critic": "null", "reward": reward, "roles__mode": "adapters", "lora__rank": 2,
            "lora__merge": merge, "gradient_checkpointing": "true", "data__eval": "null", "schedule__length": 2}  # fmt: skip
    arguments = flags("ppo", llamas, tmp_path / "ppo", **more)
    assert run("ppo", arguments, log) == 0, log.read_text()
    saved = load_file(tmp_path / "ppo" / "checkpoints" / "step-2" / "model.safetensors")
    assert all(".actor." in name or ".critic." in name for name in saved)
    assert not any("base_layer" in name or ".reward." in name or ".reference." in name for name in saved)
    actor, critic = (
        load(str(tmp_path / "ppo" / part), Loading()) for load, part in ((load_actor, "model"), (load_scalar, "critic"))
    )
    assert (tmp_path / "ppo" / "model" / "adapter_config.json").exists() == (merge == "false")
    if merge == "false":
        ranks = [json.loads((tmp_path / "ppo" / part / "adapter_config.json").read_text())["r"] for part in ("model", "critic")]
        assert ranks == [4, 3]  # those of their sources
    ids = torch.tensor([[2, 3, 4]])
    for now, start in ((actor, load_actor(str(tmp_path / "sft"), Loading())), (critic, load_scalar(str(reward), Loading()))):
        assert not torch.equal(now(ids).logits, start(ids).logits)
        assert torch.allclose(now(ids).logits, start(ids).logits, atol=1.0)


def test_a_run_of_adapters_goes_on_to_the_same_bits(llamas, reward, tmp_path):
    def stopped(_) -> None:
        right = Training.report

        def report(self, step, *more):
            if step == 1:
                raise DataError("stopped by the test")
            return right(self, step, *more)

        Training.report = report  # in the fork alone

    log, left = tmp_path / "log", []
    more = {"critic": "null", "reward": reward, "roles__mode": "adapters", "lora__rank": 2, "schedule__length": 3}
    for name, change in (("whole", None), ("parts", stopped)):
        arguments = flags("ppo", llamas, tmp_path / name, **more)
        if change is not None:
            assert run("ppo", arguments, log, change) == 65
        assert run("ppo", arguments, log) == 0, log.read_text()
        weights = [(tmp_path / name / part / "adapter_model.safetensors").read_bytes() for part in ("model", "critic")]
        left.append((metrics(tmp_path / name), weights))
    assert left[0] == left[1]


def test_adapters_in_two_processes(llamas, reward, tmp_path):
    log = tmp_path / "log"
    more = {"critic": "null", "reward": reward, "roles__mode": "adapters", "lora__rank": 2, "precision": "fp64", **SHORT}
    assert run("ppo", flags("ppo", llamas, tmp_path / "one", **more), log, fixed_rollouts) == 0, log.read_text()
    two = flags("ppo", llamas, tmp_path / "two", micro_batch_size=3, gradient_checkpointing="true", **more)
    assert run_on_two("ppo", two, log, fixed_rollouts) == [0, 0], log.read_text()
    for one, other in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        # A Llama's norms compute in float32, whatever its weights are in: they make 1e-8 of a product's last bit.
        assert losses([other]) == [pytest.approx(value, rel=1e-6, abs=1e-7) for value in losses([one])]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_frozen_layers_stay_as_they_are(stage, world, tmp_path):
    """GPT-2, whose head is tied: with its embeddings and first layer frozen, what is left trains."""
    log = tmp_path / "log"
    arguments = flags(stage, world, tmp_path / "out", frozen_layers=1, schedule__length=2, data__eval="null")
    assert run(stage, arguments, log) == 0, log.read_text()
    for part in ("model", "critic") if stage == "ppo" else ("model",):
        source = "critic" if part == "critic" else "model"
        before, after = (
            load_file(world / source / "model.safetensors"),
            load_file(tmp_path / "out" / part / "model.safetensors"),
        )
        changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
        assert not any(".wte." in name or ".wpe." in name or ".h.0." in name for name in changed)
        assert {name.split(".")[2] for name in changed if ".h." in name} == {"1"}
    if stage == "ppo":
        assert "in memory once for actor, reference; other weights, so a copy of their own: critic" in log.read_text()


def test_more_frozen_layers_than_there_are(world, tmp_path):
    assert run("sft", flags("sft", world, tmp_path / "out", frozen_layers=3), tmp_path / "log") == 65
    assert "frozen_layers 3: the model has 2 transformer layers" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("mode", "lora", "message"),
    [
        ("adapters", {}, "lora.rank must be more than 0 with roles.mode `adapters`"),
        ("shared", {"rank": 8, "base": "nf4"}, "lora.base must be `plain` with roles.mode `shared`"),
    ],
)
def test_modes_that_lora_does_not_fit(mode, lora, message):
    config = {"output": "none", "data": {"train": "none"}, "reward": {"source": "count:a"}, "lora": lora}
    with pytest.raises(ValidationError, match=message):
        PpoConfig.model_validate({**config, "roles": {"actor": "sft", "critic": "zero", "mode": mode}})


def test_the_unit_test_of_adapters(tmp_path):
    """Its probes compute log-probs and values by plain transformers, and look whether what is frozen has changed."""

    def body() -> None:
        invocation = parse("ppo", ["--unit-test", "--roles.mode=adapters", "--lora.rank=2", "--critic=zero"])
        unit_test(invocation.config, stage_module("ppo").ppo, as_json=True, learn=False)

    assert wait(fork(body, log=tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    for name in ("plain values", "frozen reference", "KL at step 0"):
        assert f'"name": "{name}"' in (tmp_path / "log").read_text()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("mode", ["separate", "adapters"])
def test_a_run_on_four_bits(mode, llamas, tmp_path):
    log = tmp_path / "log"
    more = {"critic": "zero", "roles__mode": mode, "lora__rank": 2, "lora__base": "nf4", "lora__merge": "true", **SHORT}
    assert run("ppo", flags("ppo", llamas, tmp_path / "ppo", **more), log) == 0, log.read_text()
    merged, start = (load_actor(str(place), Loading()) for place in (tmp_path / "ppo", llamas / "model"))
    moved = merged.model.layers[0].mlp.up_proj.weight - start.model.layers[0].mlp.up_proj.weight
    strengths = torch.linalg.svdvals(moved)
    assert strengths[1] > 100 * strengths[2]  # of the adapter's rank: rounding to four bits would have every rank
