"""Delayed scaling over steps, against the history kept by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.config.sections import Fp8
from rlhf.errors import DataError
from rlhf.fp8.apply import switched_off
from rlhf.fp8.linear import FP8Linear, record_magnitude
from rlhf.fp8.recipes import recipe_of
from rlhf.fp8.state import advance, calibrating, fp8_state, load_fp8_state, uncalibrated


def layer(**settings) -> FP8Linear:
    torch.manual_seed(0)
    return FP8Linear(nn.Linear(32, 16), recipe_of(Fp8(recipe="delayed", **settings)))


def step(module: FP8Linear, size: float, gradient: float) -> None:
    x = torch.full((4, 32), 0.5 * size)
    x[0, 0] = -size
    module(x).backward(torch.full((4, 16), gradient))


@pytest.mark.parametrize("history", [1, 3, 1024])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_scales_follow_the_history(history, algorithm):
    module = layer(amax_history=history, amax_algorithm=algorithm, margin=1)
    sizes = [1.0, 8.0, 2.0, 0.5, 0.25, 16.0, 1.0]
    seen: list[float] = []
    for size in sizes:
        step(module, size, gradient=size / 1000)
        advance(module)
        seen.append(size)
        amax = max(seen[-history:]) if algorithm == "max" else seen[-1]
        assert module.scale.tolist() == pytest.approx(
            [448 / amax / 2, 448 / float(module.weight.detach().abs().max()) / 2, 57344 / (amax / 1000) / 2], rel=1e-6
        )


def test_history_matters():
    """Negative control: with a history of one the scale forgets, with three it remembers."""
    scales = {}
    for history in (1, 3):
        module = layer(amax_history=history)
        for size in (8.0, 1.0):
            step(module, size, 1.0)
            advance(module)
        scales[history] = float(module.scale[0])
    assert scales == {1: 448.0, 3: 56.0}


def test_the_largest_of_several_micro_batches_counts_and_recomputing_changes_nothing():
    module = layer()
    for size in (1.0, 4.0, 2.0, 2.0):
        step(module, size, 1.0)
    advance(module)
    assert float(module.scale[0]) == 112.0


def test_scales_rest_within_a_step_and_without_gradients_nothing_is_recorded():
    module = layer()
    with torch.no_grad(), calibrating(module):
        module(torch.ones(2, 32))
    before = {name: tensor.clone() for name, tensor in fp8_state(module).items()}
    with torch.no_grad():
        module(torch.full((2, 32), 100.0))
    for name, tensor in fp8_state(module).items():
        assert torch.equal(tensor, before[name])
    step(module, 100.0, 1.0)
    assert torch.equal(module.scale, before[".scale"])
    assert float(module.amax_history[0, 0]) == 100.0


def test_what_is_not_finite_leaves_the_scale_alone():
    module = layer(amax_history=1)
    step(module, 2.0, 1.0)
    advance(module)
    step(module, float("inf"), 1.0)
    advance(module)
    assert float(module.scale[0]) == 224.0


def test_ranks_agree_on_the_largest():
    module = layer()
    step(module, 1.0, 1.0)
    advance(module, over_ranks=lambda amax: torch.maximum(amax, torch.tensor(7.0)))  # another rank saw 7 everywhere
    assert module.scale.tolist() == [64.0, 64.0, 8192.0]


def test_state_is_plain_tensors_and_loads_strictly(tmp_path):
    model = nn.ModuleDict({"a": layer(), "b": nn.Linear(2, 2)})
    step(model["a"], 3.0, 1.0)
    advance(model)
    assert set(fp8_state(model)) == {"a.amax_history", "a.scale"}
    assert not set(fp8_state(model)) & set(model.state_dict())
    save_file(fp8_state(model), tmp_path / "fp8.safetensors")
    fresh = nn.ModuleDict({"a": layer(), "b": nn.Linear(2, 2)})
    tensors = load_file(tmp_path / "fp8.safetensors")
    load_fp8_state(fresh, tensors)
    assert all(torch.equal(tensor, fp8_state(model)[name]) for name, tensor in fp8_state(fresh).items())
    with pytest.raises(DataError, match=r"a\.scale was not saved"):
        load_fp8_state(fresh, {"a.amax_history": tensors["a.amax_history"]})
    with pytest.raises(DataError, match=r"c\.scale is not in the model"):
        load_fp8_state(fresh, tensors | {"c.scale": tensors["a.scale"]})
    with pytest.raises(DataError, match=r"a\.amax_history is \(1024, 3\), the model's \(16, 3\)"):
        load_fp8_state(nn.ModuleDict({"a": layer(amax_history=16)}), tensors)


def test_what_is_not_a_number_is_passed_over():
    """A tensor with NaN has no largest magnitude; what the step's other micro-batches said stays."""
    module = layer(amax_history=4)
    x = torch.full((2, 32), 2.0)
    x[0, 0] = float("nan")
    step(module, 1.0, 1.0)
    record_magnitude(module, "activation", x)
    assert float(module.amax_history[0, 0]) == 1.0  # the tensor's own largest is not told
    record_magnitude(module, "activation", x[1:])
    advance(module)
    assert float(module.scale[0]) == 224.0


def test_of_another_plan_what_fits_is_taken_and_the_rest_is_calibrated():
    """A run that goes on with a longer keep-list, or with FP8 where there was none."""
    saved = nn.ModuleDict({"a": layer(), "b": layer()})
    for module in saved.values():
        step(module, 3.0, 1.0)
    advance(saved)
    model = nn.ModuleDict({"b": layer(), "c": layer()})
    load_fp8_state(model, fp8_state(saved), strict=False)
    assert torch.equal(model["b"].scale, saved["b"].scale)
    assert uncalibrated(model) == [model["c"]]
    before = {name: tensor.clone() for name, tensor in fp8_state(model["b"]).items()}
    with torch.no_grad(), calibrating(model):
        for module in model.values():
            module(torch.full((2, 32), 7.0))
    assert float(model["c"].scale[0]) == 64.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in fp8_state(model["b"]).items())
    load_fp8_state(model, {}, strict=False)
    with pytest.raises(DataError, match="was not saved"):
        load_fp8_state(model, {})


def test_a_span_without_fp8_leaves_scales_that_fit():
    """The same rows, with FP8 and without: the same magnitudes go into the history; nothing is rounded."""
    torch.manual_seed(0)
    x, gradient = torch.randn(4, 32), torch.randn(4, 16)
    on, off = layer(), layer()
    on(x).backward(gradient)
    with switched_off(off):
        y = off(x)
        y.backward(gradient)
        with torch.no_grad():
            off(100 * x)  # no gradient, no record
    assert torch.equal(y, nn.functional.linear(x, off.weight, off.bias))
    assert torch.equal(on.amax_history, off.amax_history)
    assert bool((off.amax_history[0] > 0).all())
