"""`rlhf fp8 inspect`: its figures against numbers worked out by hand, its levels, and the model left as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.config.sections import Fp8
from rlhf.fp8.apply import apply
from rlhf.fp8.formats import E4M3, E5M2
from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.recipes import SHAPES, recipe_of
from rlhf.training.fp8.inspection import QuantizationError, Watch, inspect, judged

RECIPES = {name: recipe_of(Fp8(recipe=name)) for name in SHAPES}


def test_figures_by_hand():
    """At a scale of 1, E4M3 holds 448 and 1; 1.0625 is a tie and becomes 1; 600 is cut to 448; 2^-11 becomes 0."""
    loss = QuantizationError()
    x = torch.tensor([448.0, 1.0, 1.0625, 600.0, 2.0**-11, 0.0]).view(1, 1, 1, 6)
    loss.add(x, E4M3, torch.ones(1, 1, 1, 1), count=6)
    signal = 448**2 + 1 + 1.0625**2 + 600**2 + 2.0**-22
    noise = 0.0625**2 + 152**2 + 2.0**-22
    assert loss.sqnr == pytest.approx(10 * math.log10(signal / noise))
    norms = math.sqrt(signal * (448**2 + 1 + 1 + 448**2))
    assert loss.cosine == pytest.approx((448**2 + 1 + 1.0625 + 600 * 448) / norms)
    assert (loss.amax, loss.clipped, loss.vanished, loss.nonzero, loss.count) == (600, 1, 1, 5, 6)


def test_nothing_lost_is_infinite_and_nonfinite_is_an_error():
    loss = QuantizationError()
    loss.add(torch.ones(1, 2, 1, 2), E4M3, torch.ones(1, 1, 1, 1), 4)
    assert (loss.sqnr, loss.cosine) == (math.inf, 1.0)
    loss.add(torch.full((1, 2, 1, 2), math.inf), E4M3, torch.ones(1, 1, 1, 1), 4)
    assert judged(loss, "activation")[0] == "error"


@pytest.mark.parametrize(
    ("noise", "format", "level"),
    [(10**-3.2, "E4M3", "ok"), (10**-2.7, "E4M3", "warn"), (10**-2.0, "E4M3", "error"), (10**-2.5, "E5M2", "ok"),
     (10**-2.0, "E5M2", "warn"), (10**-1.6, "E5M2", "error")],
)  # fmt: skip
def test_levels(noise, format, level):
    loss = QuantizationError(signal=1.0, noise=noise, rounded=1.0, dot=1.0, count=100, nonzero=100)
    assert judged(loss, "gradient", format) == (level, "" if level == "ok" else "SQNR")


def test_overflow_is_an_error_where_scales_are_current():
    loss = QuantizationError(signal=1.0, noise=1e-4, rounded=1.0, dot=1.0, count=100, nonzero=100, clipped=1)
    assert judged(loss, "activation") == ("error", "overflow")
    assert judged(loss, "activation", delayed=True) == ("warn", "overflow")
    assert judged(QuantizationError(**{**vars(loss), "clipped": 0, "vanished": 2}), "weight") == ("warn", "underflow")
    assert judged(QuantizationError(**{**vars(loss), "clipped": 0, "vanished": 2}), "gradient") == ("ok", "")


@pytest.mark.parametrize("recipe", SHAPES)
def test_what_is_measured_is_what_the_layer_does(recipe):
    """The layer's own quantised operand, and its distance from the operand."""
    torch.manual_seed(0)
    layer = FP8Linear(nn.Linear(160, 48), RECIPES[recipe])
    watch, x = Watch(layer, [RECIPES[recipe]]), torch.randn(40, 160) * torch.logspace(-3, 3, 160)
    watch("activation", x)  # remembered for delayed scales
    watch.counting = True
    watch("activation", x)
    for gemm in ("fprop", "wgrad"):
        noise = layer.quantized("activation", gemm, x).dequantized() - x
        loss = watch.losses[recipe, "activation", gemm]
        assert loss.sqnr == pytest.approx(10 * math.log10(float(x.square().sum() / noise.square().sum())), abs=1e-3)
        assert loss.clipped == 0
        assert loss.count == 40 * 160


def test_what_fills_up_a_tile_is_not_counted():
    """3 x 16 numbers in tiles of 128: the zeros beside them cannot be lost, and tiles of zeros have no scale."""
    watch, x = Watch(FP8Linear(nn.Linear(16, 16), RECIPES["block"]), [RECIPES["block"]]), torch.full((3, 16), 7.0)
    watch.counting = True
    x[1] = 0.0
    watch("activation", x)
    loss = watch.losses["block", "activation", "fprop"]
    assert (loss.count, loss.nonzero) == (48, 32)
    assert loss.smallest_scale == loss.largest_scale == 64.0


def test_delayed_scales_follow_the_micro_batches_before():
    torch.manual_seed(0)
    watch = Watch(FP8Linear(nn.Linear(64, 32), RECIPES["delayed"]), [RECIPES["delayed"], RECIPES["current"]])
    x = torch.randn(32, 64)
    watch.counting = True
    watch("activation", x)
    assert set(watch.losses) == {("current", "activation", "fprop"), ("current", "activation", "wgrad")}  # no scale yet
    watch("activation", 20 * x)
    outside = int((20 * x.abs() > x.abs().max() * (1 + 1e-6)).sum())
    assert watch.losses["delayed", "activation", "fprop"].clipped == outside > 0
    assert watch.losses["current", "activation", "fprop"].clipped == 0
    latest = replace(RECIPES["delayed"], amax_algorithm="most_recent")
    for recipe, clipped in ((RECIPES["delayed"], 0), (latest, outside)):
        watch = Watch(FP8Linear(nn.Linear(64, 32), recipe), [recipe])
        for shown in (20 * x, x):
            watch("activation", shown)
        watch.counting = True
        watch("activation", 20 * x)
        assert watch.losses["delayed", "activation", "fprop"].clipped == clipped


def test_the_worst_comes_first_and_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    with torch.no_grad():
        model[2].weight[:, 0] *= 1e6  # one scale for the whole weight leaves the rest nothing
    apply(model, Fp8(recipe="current", high_precision=("dgrad",)))
    x = torch.randn(32, 64)
    before = model(x)
    found = inspect(model, RECIPES["current"], list(RECIPES.values()), lambda: model(x).square().mean().backward())
    assert (found[0].layer, found[0].operand, found[0].level) == ("2", "weight", "warn")
    assert found[0].underflow > 0.9
    assert found[0].what_if["rowwise"] > found[0].what_if["current"]  # there each row's outlier is exact
    assert {(one.layer, one.operand) for one in found} == {
        (layer, operand) for layer in "024" for operand in ("activation", "weight", "gradient")
    }
    assert all(one.format == (E5M2 if one.operand == "gradient" else E4M3).name for one in found)
    assert all(one.level == "ok" for one in found if one.layer != "2" and one.operand != "gradient")
    assert torch.equal(model(x), before)
    assert all(layer.observe is None and layer.high_precision == {"dgrad"} for layer in model if isinstance(layer, FP8Linear))
