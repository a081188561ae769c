"""Our own layers (rlhf/fp8/linear.py): every recipe, on every device, as slow as it is exact."""

from __future__ import annotations

from torch import nn

from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.recipes import Gemm, Recipe

name = "reference"


def obstacle(recipe: Recipe) -> str:
    return ""


def layer(linear: nn.Linear, recipe: Recipe, high_precision: frozenset[Gemm]) -> FP8Linear:
    return FP8Linear(linear, recipe, high_precision)
