"""Transformer Engine 2.20: the FP8 kernels of NVIDIA's GPUs. Not yet run on a GPU; what of it is Python is under test
(tests/fp8/test_real_te.py).

A region of Transformer Engine is here one forward pass of one layer. Delayed scales are ours (state.py): Transformer Engine
would move those of all layers whenever a region ends. Ours lie still within a step, so a recomputed layer finds those of its
first pass, and the ratio of PPO starts at 1. Where there is none yet, it follows from the first tensor seen, and stays for the
rest of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf.errors import ConfigError
from rlhf.fp8.formats import E5M2
from rlhf.fp8.linear import add_delayed_buffers, record_beside, records
from rlhf.fp8.recipes import OPERANDS, Gemm, Recipe
from rlhf.fp8.scaling import largest_magnitude, scale_of

name = "te"

BACKWARD: frozenset[Gemm] = frozenset({"dgrad", "wgrad"})

MULTIPLE = {"delayed": 16, "current": 16, "block": 128, "mxfp8": 32}
"""Of tokens; what is missing is filled up with rows of zeros, which change no scale and no gradient."""

SUPPORT = {
    "delayed": "is_fp8_available",
    "current": "is_fp8_available",
    "block": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
"""What Transformer Engine says itself of the device, CUDA and cuBLAS."""

RULES: tuple[tuple[Callable[[Recipe], bool], str], ...] = (
    (lambda r: r.name not in MULTIPLE, "Transformer Engine has no such recipe"),
    (lambda r: r.name == "current" and r.margin > 0, "with it Transformer Engine has no fp8.margin"),
    (
        lambda r: r.high_precision not in (frozenset(), BACKWARD),
        "fp8.high_precision: Transformer Engine can leave out dgrad and wgrad, both or none",
    ),
    (lambda r: r.delayed and bool(r.high_precision), "fp8.high_precision: with delayed it leaves out no product"),
    (lambda r: find_spec("transformer_engine") is None, "Transformer Engine is not installed: pip install 'rlhf[fp8]'"),
    (lambda r: not torch.cuda.is_available(), "there is no CUDA device"),
    (
        lambda r: r.name == "block" and r.kind == "fp32" and torch.cuda.get_device_capability() >= (10, 0),
        "fp8.block_scales: this GPU has scales that are powers of two only",
    ),
)


def obstacle(recipe: Recipe) -> str:
    for holds, why in RULES:
        if holds(recipe):
            return why
    try:
        import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]

        able, why = getattr(engine, SUPPORT[recipe.name])(return_reason=True)
    except Exception as error:  # a library missing is a RuntimeError or an OSError as often as an ImportError
        return f"Transformer Engine cannot be used: {str(error).partition(chr(10))[0]}"
    return "" if able else why


def layer(linear: nn.Linear, recipe: Recipe, high_precision: frozenset[Gemm]) -> nn.Module:
    """A te.Linear with the parameters of `linear`.

    Raises:
        ConfigError: the products left in high precision, or the shape, are nothing Transformer Engine has.
    """
    kept, shape = high_precision | recipe.high_precision, tuple(linear.weight.shape)
    if kept not in (frozenset(), BACKWARD) or (kept and recipe.delayed):
        able = "none of them" if recipe.delayed else "dgrad and wgrad, both or none"
        raise ConfigError(
            f"fp8.keep: {', '.join(sorted(kept))} in high precision: with recipe {recipe.name} backend te can leave out "
            f"{able}. Keep whole layers, or choose backend reference"
        )
    multiple = MULTIPLE[recipe.name]
    if any(size % multiple for size in shape):
        raise ConfigError(f"fp8.recipe {recipe.name}: a layer is {shape}, no multiples of {multiple}; name it in fp8.keep")
    return _layer_class()(linear, recipe, kept)


def arguments(recipe: Recipe, kept: frozenset[Gemm]) -> tuple[str, dict[str, Any]]:
    """The class of Transformer Engine's recipe, and its fields: it takes other names, too, and ignores them."""
    from transformer_engine.common.recipe import Format  # pyright: ignore[reportMissingImports]

    fields: dict[str, Any] = {
        "fp8_format": Format.HYBRID if recipe.backward is E5M2 else Format.E4M3,
        "backward_override": "high_precision" if kept else None,
    }
    match recipe.name:
        case "delayed":
            return "DelayedScaling", fields | {"amax_history_len": 1, "reduce_amax": False}  # history and ranks: state.py
        case "current":
            return "Float8CurrentScaling", fields | {"use_power_2_scales": False}
        case "block":
            return "Float8BlockScaling", fields | {"use_f32_scales": recipe.kind == "fp32"}
        case _:
            return "MXFP8BlockScaling", fields


def engine_recipe(recipe: Recipe, kept: frozenset[Gemm]) -> Any:
    from transformer_engine.common import recipe as recipes  # pyright: ignore[reportMissingImports]

    kind, fields = arguments(recipe, kept)
    made = getattr(recipes, kind)(**fields)
    if recipe.name in ("current", "block"):  # no fields: their values are those of the environment when it was imported
        for operand in ("fwd_inp", "fwd_weight", "bwd_grad"):
            setattr(made, f"fp8_quant_{operand}", recipes.QParams(power_2_scale=recipe.kind == "power_of_two"))
    return made


@cache
def _layer_class() -> Any:
    import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # pyright: ignore[reportMissingImports]

    class EngineLinear(engine.Linear):
        """`weight` and `bias` are the parameters of the layer it stands for; nothing else is in its state dict."""

        is_fp8 = True
        backend = name
        enabled = True
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def __init__(self, linear: nn.Linear, recipe: Recipe, kept: frozenset[Gemm]) -> None:
            has_bias, dtype = linear.bias is not None, linear.weight.dtype
            super().__init__(linear.in_features, linear.out_features, bias=has_bias, params_dtype=dtype, device="meta")
            self.weight, self.bias = linear.weight, linear.bias
            self.train(linear.training)
            self.recipe, self.high_precision = recipe, kept
            self.engine_recipe = engine_recipe(recipe, kept)
            self.calibrating = False
            if recipe.delayed:
                add_delayed_buffers(self, recipe)
                self.register_buffer("_unrecorded", torch.zeros(1, device=linear.weight.device), persistent=False)
                self._scaled: dict[int, int] = {}  # by operand, the version of `scale` that was seen to have one
                self.fp8_meta[FP8GlobalStateManager.get_buffer_info()] = ()  # to it: "has been told whose scales to move"

        def forward(self, x: Tensor) -> Tensor:
            if not self.enabled:
                y = F.linear(x, self.weight, self.bias)
                record_beside(self, x, y)
                return y
            flat = x.reshape(-1, x.shape[-1])
            padded = F.pad(flat, (0, 0, 0, -len(flat) % MULTIPLE[self.recipe.name]))
            if self.recipe.delayed:
                self._first_scale(0, flat)
                self._first_scale(1, self.weight)
            with engine.autocast(enabled=True, recipe=self.engine_recipe):
                y = super().forward(padded)
            if self.recipe.delayed and y.requires_grad:
                y.register_hook(lambda gradient: self._first_scale(2, gradient))
            return y[: len(flat)].view(*x.shape[:-1], y.shape[-1])

        def init_fp8_metadata(self, num_gemms: int = 1) -> None:
            """Called in each forward pass; afterwards its quantizers read and write our scales and magnitudes."""
            super().init_fp8_metadata(num_gemms)
            if not self.recipe.delayed:
                return
            quantizers = *self.quantizers["scaling_fwd"][:2], self.quantizers["scaling_bwd"][0]
            for place, quantizer in enumerate(quantizers):
                quantizer.scale = self.scale[place]
                quantizer.amax = self.amax_history[0, place : place + 1] if records(self) or place == 2 else self._unrecorded

        @torch.no_grad()
        def _first_scale(self, place: int, x: Tensor) -> None:
            if self._scaled.get(place) == self.scale._version:  # asking a GPU's tensor takes a wait
                return
            if not bool(self.scale[place] > 0):
                format = self.recipe.format_of(OPERANDS[place])
                self.scale[place] = scale_of(largest_magnitude(x), format, self.recipe.margin)
            self._scaled[place] = self.scale._version

    return EngineLinear
