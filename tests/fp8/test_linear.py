"""The FP8 layer against its definition: three products of operands rounded by hand, one recipe at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf.config.sections import Fp8
from rlhf.fp8.formats import E4M3, E5M2, encode
from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.recipes import GEMMS, recipe_of
from rlhf.fp8.state import advance, calibrating, forget_weights

RECIPES = ("delayed", "current", "block", "rowwise", "mxfp8")
KINDS = {"block": "power_of_two", "mxfp8": "power_of_two"}
"""Of scales; the exponents of MXFP8 are powers of two, too."""
# tile of an operand whose product sums over its columns: (activation and gradient, weight)
TILES = {"delayed": (None, None), "current": (None, None), "block": ((1, 128), (128, 128)), "rowwise": ((1, None), (1, None)),
         "mxfp8": ((1, 32), (1, 32))}  # fmt: skip


def rounded(x: torch.Tensor, format, tile, kind: str) -> torch.Tensor:
    """What FP8 makes of a matrix that is summed over its columns."""
    x = x.double()
    rows, columns = tile or (None, None)
    if tile is None:
        rows = columns = None
    rows, columns = rows or x.shape[0], columns or x.shape[1]
    out = torch.zeros_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns]
            amax = float(part.abs().max())
            scale = torch.tensor(format.largest / amax if amax else 1.0).double()
            if kind == "power_of_two":
                scale = 2.0 ** torch.floor(torch.log2(scale))
            scale = scale.float()
            out[i : i + rows, j : j + columns] = encode(part.float() * scale, format).double() / scale.double()
    return out


def layer_and_data(seed=0, tokens=96, width=272, out=144, bias=True):
    torch.manual_seed(seed)
    linear = nn.Linear(width, out, bias=bias)
    return linear, torch.randn(2, tokens // 2, width, requires_grad=True), torch.randn(2, tokens // 2, out) * 1e-3


def results(layer, x, gradient):
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(gradient)
    return y.detach(), x.grad, layer.weight.grad.clone(), None if layer.bias is None else layer.bias.grad.clone()


@pytest.mark.parametrize("name", RECIPES)
def test_three_products(name):
    linear, x, gradient = layer_and_data()
    y, of_x, of_weight, of_bias = results(FP8Linear(linear, recipe_of(Fp8(recipe=name))), x, gradient)
    backward = E5M2 if name in ("delayed", "current") else E4M3
    (tile, weight_tile), kind = TILES[name], KINDS.get(name, "fp32")
    flat, g, w = x.detach().flatten(0, 1), gradient.flatten(0, 1), linear.weight.detach()
    activation, weight = rounded(flat, E4M3, tile, kind), rounded(w, E4M3, weight_tile, kind)
    expected = activation @ weight.t() + linear.bias.double()
    torch.testing.assert_close(y.flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)
    # dgrad sums over the weight's rows, wgrad over tokens: operands as columns, quantised along what is summed over
    expected = rounded(g, backward, tile, kind) @ rounded(w.t(), E4M3, weight_tile, kind).t()
    torch.testing.assert_close(of_x.flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-8)
    expected = rounded(g.t(), backward, tile, kind) @ rounded(flat.t(), E4M3, tile, kind).t()
    torch.testing.assert_close(of_weight.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_bias, g.sum(0))


@pytest.mark.parametrize("name", RECIPES)
def test_the_formats_matter(name):
    """Negative control: with formats swapped, or one for the other, the gradient is another one."""
    linear, x, gradient = layer_and_data()
    plain = results(FP8Linear(linear, recipe_of(Fp8(recipe=name, format="hybrid"))), x, gradient)
    other = results(FP8Linear(linear, recipe_of(Fp8(recipe=name, format="e4m3"))), x, gradient)
    assert torch.equal(plain[0], other[0])
    assert not torch.equal(plain[1], other[1])
    assert not torch.equal(plain[2], other[2])


def test_off_is_nn_linear_to_the_bit():
    for bias in (True, False):
        linear, x, gradient = layer_and_data(bias=bias)
        off = FP8Linear(linear, recipe_of(Fp8(recipe="block", high_precision=GEMMS)))
        for ours, theirs in zip(results(off, x, gradient), results(linear, x, gradient), strict=True):
            assert (ours is theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("kept", GEMMS)
@pytest.mark.parametrize("name", RECIPES)
def test_each_product_can_be_kept(name, kept):
    """What is kept is nn.Linear's, what is not is the FP8 layer's."""
    linear, x, gradient = layer_and_data()
    recipe = recipe_of(Fp8(recipe=name))
    fp8, exact = results(FP8Linear(linear, recipe), x, gradient), results(linear, x, gradient)
    mixed = results(FP8Linear(linear, recipe, frozenset([kept])), x, gradient)
    for place, gemm in enumerate(GEMMS):
        wanted, other = (exact, fp8) if gemm == kept else (fp8, exact)
        torch.testing.assert_close(mixed[place], wanted[place], rtol=1e-6, atol=1e-9)
        assert not torch.allclose(mixed[place], other[place], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", RECIPES)
def test_bf16_autocast(name):
    """Under autocast the result has autocast's type, and what it quantises is bf16, as what nn.Linear multiplies."""
    linear, x, gradient = layer_and_data()
    layer = FP8Linear(linear, recipe_of(Fp8(recipe=name)))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        plain = linear(x)
    assert y.dtype == plain.dtype == torch.bfloat16
    assert (y.float() - plain.float()).norm() / plain.float().norm() < 0.06
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, layer(x.bfloat16()))
    y.backward(gradient.bfloat16())
    assert linear.weight.grad.dtype == torch.float32


def test_a_frozen_weight_gets_no_gradient_and_a_gradient_goes_through():
    linear, x, gradient = layer_and_data()
    linear.requires_grad_(False)
    layer = FP8Linear(linear, recipe_of(Fp8(recipe="block")))
    layer(x).backward(gradient)
    assert linear.weight.grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_changed_weight_is_seen(name):
    """Quantised weights are kept between calls; an optimizer's step in place must drop them."""
    linear, x, _ = layer_and_data()
    layer = FP8Linear(linear, recipe_of(Fp8(recipe=name)))
    before = layer(x)
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        linear.weight.mul_(-1)
    assert torch.allclose(layer(x) - linear.bias, -(before - linear.bias), atol=1e-6)


@pytest.mark.parametrize(("name", "invariant"), [("delayed", True), ("block", True), ("rowwise", True), ("mxfp8", True),
                                                 ("current", False)])  # fmt: skip
def test_batch_mates(name, invariant):
    linear, x, _ = layer_and_data()
    layer = FP8Linear(linear, recipe_of(Fp8(recipe=name)))
    assert layer.recipe.batch_invariant == invariant
    with torch.no_grad(), calibrating(layer):
        layer(x)
    with torch.no_grad():
        together, alone = layer(x), torch.cat([layer(x[:1]), layer(x[1:])])
    assert torch.equal(together, alone) == invariant


def test_numbers_beyond_delayed_scales_saturate():
    """Amax jumps a hundredfold in one step: what is too large becomes the largest, and the next step has recovered."""
    linear, x, _ = layer_and_data(bias=False)
    layer = FP8Linear(linear, recipe_of(Fp8(recipe="delayed")))
    with torch.no_grad(), calibrating(layer):
        layer(x)
    limit = float(x.detach().abs().max())
    clipped = layer(100 * x)
    assert torch.isfinite(clipped).all()
    assert torch.allclose(clipped, linear((100 * x).clamp(-limit, limit)), rtol=0.3, atol=0.3)
    advance(layer)
    exact = linear(100 * x)
    assert (clipped - exact).norm() / exact.norm() > 0.8
    assert (layer(100 * x) - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("name", RECIPES)
def test_all_that_backward_needs_is_saved_by_autograd(name):
    """What is kept elsewhere, gradient checkpointing cannot drop."""
    linear, x, gradient = layer_and_data()
    layer = FP8Linear(linear, recipe_of(Fp8(recipe=name)))
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        y = layer(x)
    assert sum(tensor.shape == (96, 272) for tensor in packed) == 1
    packed[:] = [torch.zeros_like(tensor) for tensor in packed]
    y.backward(gradient)
    assert not linear.weight.grad.any()


def test_weights_written_behind_torchs_back_are_seen_after_a_step():
    """DeepSpeed copies into `.data`, which counts no version: the session forgets quantised weights with every step."""
    linear, x, _ = layer_and_data(bias=False)
    layer = FP8Linear(linear, recipe_of(Fp8(recipe="block")))
    before = layer(x)
    linear.weight.data.mul_(2)
    assert torch.equal(layer(x), before)
    forget_weights(layer)
    assert torch.equal(layer(x), 2 * before)
