"""A linear layer whose three matrix products run in FP8: the reference backend, for any device.

Operands are rounded to numbers FP8 can hold, and multiplied in float32. Products of two FP8 numbers are exact there, and what a
GPU's tensor cores lose in their sums is 30 to 200 times below what the rounding of operands loses (docs/fp8.md), so a run here
tells what FP8 does to a model, without the hardware. With `high_precision` holding all three products the layer is nn.Linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf.fp8.recipes import GEMMS, OPERANDS, Gemm, Operand, Recipe
from rlhf.fp8.scaling import Quantized, largest_magnitude, quantize, quantize_tiles, scale_of

Observer = Callable[[Operand, Tensor], None]
"""Is shown each operand, in high precision, as a matrix."""


class FP8Linear(nn.Linear):
    """`weight` and `bias` are the parameters of the layer it stands for, not copies; names in a state dict stay the same.

    With delayed scaling, row 0 of `amax_history` (history, 3: activation, weight, gradient) collects the largest magnitudes
    of the step at hand, and `scale` (3) follows from the history between steps (state.py). 0 is no scale yet: then the
    tensor's own largest magnitude is taken, where Transformer Engine's DelayedScaling starts from a scale of 1.
    """

    is_fp8 = True
    backend = "reference"
    enabled = True
    keeps_weights = True
    """False where ranks divide weights: a quantised one that is kept is whole, and on every rank."""
    amax_history: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, recipe: Recipe, high_precision: frozenset[Gemm] = frozenset()) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.recipe, self.high_precision = recipe, high_precision | recipe.high_precision
        self.observe: Observer | None = None
        self.calibrating = False
        if recipe.delayed:
            add_delayed_buffers(self, recipe)
        self._weights: dict[tuple[int, int], tuple[object, Quantized]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            y = super().forward(x)
            record_beside(self, x, y)
            return y
        if len(self.high_precision) == len(GEMMS) and self.observe is None:
            return super().forward(x)
        return _Products.apply(x, self.weight, self.bias, self, records(self))  # pyright: ignore[reportReturnType]

    def quantized(self, operand: Operand, gemm: Gemm, x: Tensor) -> Quantized:
        """An operand (matrix) as the product takes it."""
        recipe, format = self.recipe, self.recipe.format_of(operand)
        tile = recipe.tile_of(operand, gemm)
        if tile != (0, 0):
            return quantize_tiles(x, format, tile, recipe.kind)
        place = OPERANDS.index(operand)
        if recipe.delayed and bool(self.scale[place] > 0):
            return quantize(x, format, self.scale[place])
        return quantize(x, format, scale_of(largest_magnitude(x), format, recipe.margin))

    def quantized_weight(self, gemm: Gemm) -> Quantized:
        """The weight as the product takes it, computed once as long as neither the weight nor its scale changes."""
        weight, tile = self.weight, self.recipe.tile_of("weight", gemm)
        if not self.keeps_weights:
            return self.quantized("weight", gemm, weight.detach())
        now = (weight._version, weight.data_ptr(), self.scale._version if self.recipe.delayed else 0)
        before = self._weights.get(tile)
        if before is None or before[0] != now:
            self._weights[tile] = before = now, self.quantized("weight", gemm, weight.detach())
        return before[1]

    def forget_weights(self) -> None:
        """Weights are quantised anew: an engine may have written them where no version of a tensor tells (`.data`)."""
        self._weights.clear()


def records(layer: Any) -> bool:
    """Whether a pass at this moment goes into the history of delayed scaling."""
    return layer.recipe.delayed and (layer.calibrating or torch.is_grad_enabled())


def record_magnitude(layer: Any, operand: Operand, x: Tensor) -> None:
    """Takes an operand's largest magnitude into the step's row; a tensor with NaN has none, and would cost that row."""
    latest = layer.amax_history[0, OPERANDS.index(operand)]
    latest.copy_(torch.fmax(latest, largest_magnitude(x)))


def record_beside(layer: Any, x: Tensor, y: Tensor) -> None:
    """What a layer with delayed scaling would have seen, of a pass without FP8: its scales fit when FP8 goes on."""
    if not records(layer):
        return
    record_magnitude(layer, "activation", x.detach())
    record_magnitude(layer, "weight", layer.weight.detach())
    if y.requires_grad:
        y.register_hook(lambda gradient: record_magnitude(layer, "gradient", gradient))


def add_delayed_buffers(layer: nn.Linear, recipe: Recipe) -> None:
    """Gives a layer, of whichever backend, the tensors delayed scaling remembers by; no state dict shows them."""
    device = layer.weight.device
    history = torch.zeros(recipe.amax_history, len(OPERANDS), device=device)
    layer.register_buffer("amax_history", history, persistent=False)
    layer.register_buffer("scale", torch.zeros(len(OPERANDS), device=device), persistent=False)


class _Products(torch.autograd.Function):
    """x (..., in), weight (out, in), bias (out) or None -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FP8Linear, record: bool) -> Tensor:
        ctx.layer, ctx.record, ctx.shape, ctx.has_bias = layer, record, x.shape, bias is not None
        ctx.dtypes = x.dtype, weight.dtype
        flat = x.reshape(-1, x.shape[-1]).to(_result_type(x))  # autocast has nn.Linear see bf16, and a GPU's FP8 layers, too
        operands: tuple[tuple[Operand, Tensor], ...] = (("activation", flat), ("weight", weight))
        for operand, matrix in operands:
            if record:
                record_magnitude(layer, operand, matrix)
            if layer.observe is not None:
                layer.observe(operand, matrix)
        quantized = None
        if "fprop" in layer.high_precision:
            y = F.linear(flat, weight, bias)
        else:
            quantized = layer.quantized("activation", "fprop", flat)
            y = _times(quantized, layer.quantized_weight("fprop"), transposed=True)
            if bias is not None:
                y = y + bias.float()
            y = y.to(flat.dtype)
        # a tensor of one scale is the same operand in wgrad; others are quantised again there, along tokens
        again = quantized is None or quantized.factor is None or "wgrad" in layer.high_precision
        kept = Quantized(flat, None) if quantized is None or again else quantized
        ctx.again = again
        ctx.save_for_backward(*(kept if ctx.needs_input_grad[1] else (None, None)), weight)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer: FP8Linear = ctx.layer
        activation, factor, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        if ctx.record:
            record_magnitude(layer, "gradient", gradient)
        if layer.observe is not None:
            layer.observe("gradient", gradient)
        of_x = of_weight = of_bias = None
        quantized = None
        if ctx.needs_input_grad[0]:
            if "dgrad" in layer.high_precision:
                of_x = gradient @ weight.to(gradient.dtype)
            else:
                quantized = layer.quantized("gradient", "dgrad", gradient)
                of_x = _times(quantized, layer.quantized_weight("dgrad"))
            of_x = of_x.to(ctx.dtypes[0]).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            if "wgrad" in layer.high_precision:
                of_weight = gradient.t() @ activation.to(gradient.dtype)
            else:
                if quantized is None or quantized.factor is None:
                    quantized = layer.quantized("gradient", "wgrad", gradient)
                right = layer.quantized("activation", "wgrad", activation) if ctx.again else Quantized(activation, factor)
                of_weight = _times(Quantized(quantized.values.t(), quantized.factor), right)
            of_weight = of_weight.to(ctx.dtypes[1])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = gradient.float().sum(0).to(ctx.dtypes[1])
        return of_x, of_weight, of_bias, None, None


def _times(left: Quantized, right: Quantized, transposed: bool = False) -> Tensor:
    """left @ right in float32; one scale a tensor is multiplied in afterwards, as the hardware does."""
    with torch.autocast(left.values.device.type, enabled=False):
        product = left.values @ (right.values.t() if transposed else right.values)
    factors = [one.factor for one in (left, right) if one.factor is not None]
    if factors:
        product.mul_(factors[0] * factors[1] if len(factors) == 2 else factors[0])
    return product


def _result_type(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
