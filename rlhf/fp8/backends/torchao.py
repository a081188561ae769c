"""torchao 0.18: FP8 products of PyTorch itself, of every GPU from compute capability 8.9 on. Not yet run on a GPU.

Without a GPU torchao emulates them, for tests: `auto` does not choose it there, the reference is faster. On a GPU it wants
torch.compile to be fast, and rowwise products come out as bfloat16, whatever `precision` is.
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
from rlhf.fp8.recipes import Gemm, Recipe

name = "torchao"

WGRAD: frozenset[Gemm] = frozenset({"wgrad"})

RULES: tuple[tuple[Callable[[Recipe], bool], str], ...] = (
    (lambda r: r.name not in ("current", "rowwise"), "torchao has current and rowwise only"),
    (lambda r: r.name == "current" and r.margin > 0, "torchao has no fp8.margin"),
    (lambda r: not r.high_precision <= WGRAD, "fp8.high_precision: torchao can leave out wgrad only"),
    (lambda r: find_spec("torchao") is None, "torchao is not installed: pip install 'rlhf[torchao]'"),
    (
        lambda r: torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
        "the GPU's compute capability is below 8.9",
    ),
)


def obstacle(recipe: Recipe) -> str:
    for holds, why in RULES:
        if holds(recipe):
            return why
    try:
        import torchao.float8  # noqa: F401  # pyright: ignore[reportMissingImports]
    except Exception as error:  # made for another torch, it fails as it pleases
        return f"torchao cannot be imported: {str(error).partition(chr(10))[0]}"
    return ""


def layer(linear: nn.Linear, recipe: Recipe, high_precision: frozenset[Gemm]) -> nn.Linear:
    """A Float8Linear with the parameters of `linear`.

    Raises:
        ConfigError: products are left in high precision that torchao cannot leave out.
    """
    kept = high_precision | recipe.high_precision
    if not kept <= WGRAD:
        raise ConfigError(
            f"fp8.keep: {', '.join(sorted(kept))} in high precision: backend torchao can leave out wgrad only. "
            "Keep whole layers, or choose backend reference"
        )
    made = _layer_class().from_float(linear, float8_config(recipe, kept))
    made.train(linear.training)
    made.is_fp8, made.recipe, made.high_precision = True, recipe, kept
    made.backend = name
    if not torch.cuda.is_available():
        made.backend = f"{name} (emulated: no GPU)"
        made.register_forward_pre_hook(_autocast)
    return made


@cache
def _layer_class() -> Any:
    from torchao.float8.float8_linear import Float8Linear  # pyright: ignore[reportMissingImports]

    class SwitchedLinear(Float8Linear):
        enabled = True

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.enabled else F.linear(x, self.weight, self.bias)

    return SwitchedLinear


def _autocast(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the layer does itself under a GPU's autocast, but not under a CPU's."""
    device = inputs[0].device.type
    return (inputs[0].to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else inputs


def float8_config(recipe: Recipe, kept: frozenset[Gemm]) -> Any:
    from torchao.float8.config import (  # pyright: ignore[reportMissingImports]
        CastConfig,
        Float8LinearConfig,
        ScalingGranularity,
        ScalingType,
    )

    granularity = ScalingGranularity.AXISWISE if recipe.name == "rowwise" else ScalingGranularity.TENSORWISE
    forward = CastConfig(scaling_granularity=granularity, target_dtype=recipe.forward.dtype)
    backward = CastConfig(scaling_granularity=granularity, target_dtype=recipe.backward.dtype)

    def for_weight(cast: Any) -> Any:
        return CastConfig(ScalingType.DISABLED, target_dtype=cast.target_dtype) if "wgrad" in kept else cast

    return Float8LinearConfig(
        cast_config_input=forward,
        cast_config_input_for_grad_weight=for_weight(forward),
        cast_config_weight=forward,
        cast_config_grad_output=backward,
        cast_config_grad_output_for_grad_weight=for_weight(backward),
        pad_inner_dim=True,  # wgrad sums over tokens, of which there must be a multiple of 16
        emulate=not torch.cuda.is_available(),
        round_scales_to_power_of_2=recipe.kind == "power_of_two",
    )
