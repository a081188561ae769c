"""The stages with FP8 layers: they learn, resume to the bit, and leave plain models."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import flags, left, metrics, run, start_on, wait
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.fp8.recipes import SHAPES
from rlhf.fp8.state import advance
from rlhf.models.load import Loading, load_actor

STAGES = ("sft", "rm", "dpo", "ppo")
RECIPES = ("delayed", "current", "block", "rowwise", "mxfp8")


def arguments(stage: str, world: Path, output: Path, recipe: str, **more: object) -> list[str]:
    return flags(stage, world, output, fp8__recipe=recipe, **more)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_first_ratio_of_ppo_is_exactly_one(recipe, llamas, tmp_path):
    """It is checked in every run's first iteration; micro-batches of four leave pads and company to get wrong."""
    output, log = tmp_path / "ppo", tmp_path / "log"
    one = {"schedule__length": 1, "micro_batch_size": 4, "ppo__epochs": 1, "ppo__minibatch_size": 14}
    assert run("ppo", arguments("ppo", llamas, output, recipe, **one), log) == 0, log.read_text()
    assert f"recipe {recipe}, backend reference" in log.read_text()
    assert metrics(output)[1]["policy/max_abs_log_ratio"] == 0
    said = next(line for line in log.read_text().splitlines() if "scored alone and together" in line)
    assert ("warning: fp8.recipe current scales all rows of a batch together" in said) == (recipe == "current")
    assert ("at most 0.0e+00" in said) == (recipe != "current")


def test_scales_that_move_between_scoring_and_update_are_found(llamas, tmp_path):
    """Negative control of the one above."""

    def moving(module) -> None:
        credit = module.credit

        def credit_and_move(experience, *rest):
            for model in moved:
                for layer in model.modules():
                    if hasattr(layer, "amax_history"):
                        layer.amax_history[0] = 64.0
                advance(model)
            return credit(experience, *rest)

        moved: list[torch.nn.Module] = []
        opened = module.open_ppo
        module.open_ppo = lambda config: (roles := opened(config), moved.append(roles.policy))[0]
        module.credit = credit_and_move

    log = tmp_path / "log"
    assert run("ppo", arguments("ppo", llamas, tmp_path / "ppo", "delayed"), log, moving) == 1
    assert "first ratio" in log.read_text()


@pytest.mark.parametrize("name", ["delayed", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_it_goes_on_to_the_same_bits(stage, processes, name, llamas, tmp_path):
    more = {"delayed": {"fp8__recipe": "delayed"}, "lora": {"fp8__recipe": "block", "lora__rank": 4}}[name]
    log, settings = tmp_path / "log", {"schedule__length": 8, **more}
    whole = flags(stage, llamas, tmp_path / "whole", **settings)
    assert [wait(pid) for pid in start_on(processes, stage, whole, log)] == [0] * processes, log.read_text()
    output = tmp_path / "killed"
    pids = start_on(processes, stage, flags(stage, llamas, output, **settings), log)
    while not list((output / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait(pid)
    again = start_on(processes, stage, flags(stage, llamas, output, **settings), log)
    assert [wait(pid) for pid in again] == [0] * processes, log.read_text()
    assert "goes on from" in log.read_text()
    assert left(output) == left(tmp_path / "whole")


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_is_a_plain_model(stage, llamas, tmp_path):
    """The weights of the last training checkpoint, in float32, under the names they always had."""
    output, log = tmp_path / stage, tmp_path / "log"
    assert run(stage, arguments(stage, llamas, output, "delayed"), log) == 0, log.read_text()
    saved = load_file(output / "model" / "model.safetensors")
    trained = load_file(output / "checkpoints" / "step-4" / "model.safetensors")
    role = "critic." if stage == "rm" else "actor."
    assert saved.keys() == {name.removeprefix(role) for name in trained if name.startswith(role)}
    assert all(torch.equal(tensor, trained[role + name]) for name, tensor in saved.items())
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    start = load_file(llamas / ("critic" if stage == "rm" else "model") / "model.safetensors")
    assert any(not torch.equal(saved[name], tensor) for name, tensor in start.items() if name in saved)


def test_an_adapter_trained_over_fp8_merges_to_what_transformers_loads(llamas, tmp_path):
    first, second, log = tmp_path / "adapter", tmp_path / "merged", tmp_path / "log"
    lora = {"lora__rank": 4, "optimizer__lr": 1e-2}
    assert run("sft", arguments("sft", llamas, first, "block", **lora), log) == 0, log.read_text()
    assert run("sft", arguments("sft", llamas, second, "block", **lora, lora__merge="true"), log) == 0, log.read_text()
    ids = torch.tensor([[2, 3, 4, 5]])
    merged = AutoModelForCausalLM.from_pretrained(second / "model")(ids).logits
    assert torch.allclose(load_actor(str(first), Loading())(ids).logits, merged, atol=1e-5)
    assert not torch.allclose(load_actor(str(llamas / "model"), Loading())(ids).logits, merged, atol=1e-3)


def test_gradient_checkpointing_changes_nothing(llamas, tmp_path):
    """Recomputed forwards record the same magnitudes again."""
    log = tmp_path / "log"
    for name, setting in (("plain", "false"), ("again", "true")):
        more = {"gradient_checkpointing": setting}
        assert run("sft", arguments("sft", llamas, tmp_path / name, "delayed", **more), log) == 0, log.read_text()
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "again")
    states = [load_file(tmp_path / name / "checkpoints" / "step-4" / "fp8.safetensors") for name in ("plain", "again")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_ranks_agree_on_scales(llamas, tmp_path):
    """Two processes see halves of the batch one process sees; magnitudes of activations are of all of them."""
    log, settings = tmp_path / "log", {"schedule__length": 1, "batch_size": 8}
    assert run("sft", arguments("sft", llamas, tmp_path / "one", "delayed", **settings), log) == 0, log.read_text()
    pids = start_on(2, "sft", arguments("sft", llamas, tmp_path / "two", "delayed", **settings), log)
    assert [wait(pid) for pid in pids] == [0, 0], log.read_text()
    one, two = (load_file(tmp_path / n / "checkpoints" / "step-1" / "fp8.safetensors") for n in ("one", "two"))
    first_layer = "0.actor.model.layers.0.self_attn.q_proj.scale"  # what it sees is not yet touched by rounding
    assert torch.equal(one[first_layer][:2], two[first_layer][:2])


def test_fp64_and_the_unit_test_are_refused(llamas, tmp_path):
    log = tmp_path / "log"
    assert run("sft", arguments("sft", llamas, tmp_path / "a", "block", precision="fp64"), log) == 78
    assert "fp8.recipe must be `none` with precision `fp64`" in log.read_text()
    assert run("ppo", ["--unit-test", "--fp8.recipe=block"], log) == 78
    assert "fp8.recipe: the unit test compares numbers closer than FP8 can tell apart" in log.read_text()


def test_the_check_finds_a_recipe_that_mixes_rows(llamas, tmp_path, monkeypatch):
    """Negative control: per-tensor scales, declared not to depend on the batch."""
    monkeypatch.setitem(SHAPES, "current", replace(SHAPES["current"], batch_invariant=True))
    log = tmp_path / "log"
    assert run("ppo", arguments("ppo", llamas, tmp_path / "ppo", "current", schedule__length=1), log) == 1
    assert "batch mates" in log.read_text()


@pytest.mark.parametrize(("first", "second"), [("none", "delayed"), ("delayed", "delayed"), ("delayed", "none")])
def test_a_run_goes_on_with_other_fp8_settings_where_it_may(first, second, llamas, tmp_path):
    """Rungs 1 and 4 of the debugging ladder: without FP8, and with a keep-list."""
    output, log, long = tmp_path / "ppo", tmp_path / "log", {"schedule__length": 8}
    pid = start_on(1, "ppo", arguments("ppo", llamas, output, first, **long), log)[0]
    while not list((output / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    keep = {"fp8__keep": "*.down_proj"} if first == second else {}
    changed = arguments("ppo", llamas, output, second, **long, **keep)
    assert run("ppo", changed, log) == 65
    assert run("ppo", [*changed, "--allow-inexact-resume"], log) == 0, log.read_text()
    assert "goes on from" in log.read_text()
    assert ("FP8 layers have no scale in the checkpoint" in log.read_text()) == (first == "none")
