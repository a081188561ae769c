"""`rlhf fp8 bisect`: planted faults are named, a healthy model is not blamed."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import nn

from rlhf.config.parse import parse
from rlhf.config.sections import Fp8
from rlhf.fp8.apply import switched_off
from rlhf.fp8.plan import plan, require_matches
from rlhf.fp8.state import calibrating, fp8_state
from rlhf.training.fp8.bisect import _keep_list, bisect, keep_patterns
from rlhf.training.fp8.sft import Subject, open_subject, read_rows

FAULTY = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}


def opened(files, recipe: str, **changes: object) -> Subject:
    fields = {"model": files / "model", "data": files / "rows.jsonl", "output": os.devnull, "fp8.recipe": recipe, **changes}
    return open_subject(parse("sft", [f"--{name}={value}" for name, value in fields.items()]).config)


@torch.no_grad()
def plant(policy: nn.Module, channels: slice, factor: float) -> None:
    """The norm before layer 1's attention makes channels that much larger, the layers after it take it back.

    One channel of 1e4 is not enough to hurt: E4M3 spans 2e5 from its smallest number to its largest.
    """
    layer = policy.get_submodule("actor.model.layers.1")
    layer.input_layernorm.weight[channels] *= factor  # pyright: ignore
    for name in "qkv":
        layer.get_submodule(f"self_attn.{name}_proj").weight[:, channels] /= factor  # pyright: ignore


def named(patterns: list[str]) -> set[str]:
    return {pattern.partition(":")[0] for pattern in patterns}


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_an_outlier_channel_is_named(recipe, subject_files):
    subject = opened(subject_files, recipe)
    rows = read_rows(subject, subject.config.data.train)
    healthy = subject.logprobs(batches := subject.batches(rows[:16]))
    plant(subject.policy, slice(5, 6), 1e6)
    with switched_off(subject.policy):
        plain = subject.logprobs(batches)
    assert (plain - healthy).abs().mean() < 0.1  # the function is what it was
    found = bisect(subject, batches)
    assert named(keep_patterns(found)) <= FAULTY
    assert "model.layers.1.self_attn.v_proj" in found[0].keep  # q and k of a model that attends evenly matter less
    assert found[0].left <= 0.25 * found[0].error


def test_stale_delayed_scales_are_named(subject_files):
    subject = opened(subject_files, "delayed")
    rows = read_rows(subject, subject.config.data.train)
    with calibrating(subject.policy):
        subject.loss(subject.batches(rows[16:32]))
    batches = subject.batches(rows[:16])
    assert keep_patterns(bisect(subject, batches)) == []
    plant(subject.policy, slice(None), 1e4)
    state = {name: tensor.clone() for name, tensor in fp8_state(subject.policy).items()}
    found = bisect(subject, batches)
    assert named(keep_patterns(found)) == FAULTY
    assert all(one.left < 0.3 * one.error for one in found if one.keep)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fp8_state(subject.policy).items())


@pytest.mark.parametrize(
    "recipe", ["block", *(pytest.param(name, marks=pytest.mark.slow) for name in ("current", "rowwise", "mxfp8"))]
)
def test_nothing_stands_out_in_a_healthy_model(recipe, subject_files):
    subject = opened(subject_files, recipe)
    found = bisect(subject, subject.batches(read_rows(subject, subject.config.data.train)[:16]))
    assert [one.gemm for one in found] == ["fprop", "dgrad", "wgrad"]
    assert keep_patterns(found) == []
    assert all(0 < one.error < 0.2 for one in found)


def test_the_list_is_what_keep_takes(subject_files):
    """With the list in the config, the error is the one promised."""
    subject = opened(subject_files, "current")
    plant(subject.policy, slice(5, 6), 1e6)
    rows = read_rows(subject, subject.config.data.train)[:16]
    found = bisect(subject, subject.batches(rows))
    subject_kept = opened(subject_files, "current", **{"fp8.keep": ",".join(keep_patterns(found))})
    plant(subject_kept.policy, slice(5, 6), 1e6)
    again = bisect(subject_kept, subject_kept.batches(rows))
    for before, after in zip(found, again, strict=True):
        assert after.error == pytest.approx(before.left)
    assert keep_patterns(again) == []


def test_with_lora_the_names_are_those_fp8_keep_takes(subject_files):
    """Of the frozen base: names without PEFT's wrappers, and no wgrad, which a frozen weight does not have."""
    subject = opened(subject_files, "current", **{"lora.rank": 4})
    layer = subject.policy.get_submodule("actor.base_model.model.model.layers.1")
    with torch.no_grad():
        layer.input_layernorm.weight[5:6] *= 1e6  # pyright: ignore
        for name in "qkv":
            layer.get_submodule(f"self_attn.{name}_proj").base_layer.weight[:, 5:6] /= 1e6  # pyright: ignore
    found = bisect(subject, subject.batches(read_rows(subject, subject.config.data.train)[:16]))
    assert [one.gemm for one in found] == ["fprop", "dgrad"]
    patterns = keep_patterns(found)
    assert "model.layers.1.self_attn.v_proj" in named(patterns)
    decisions = plan(subject.roles.actor, subject.config.fp8)
    require_matches(decisions, Fp8(recipe="current", keep=tuple(patterns)), subject.roles.actor)


def test_where_every_error_is_infinite_nothing_stands_out():
    layers = {str(number): math.inf for number in range(8)}
    assert _keep_list("fprop", layers, lambda *_: math.inf).keep == []
