"""Where FP8 layers come from: a backend says whether it can do a recipe here, and makes layers that share the parameters."""

from __future__ import annotations

from itertools import takewhile
from typing import Protocol

import torch
from torch import nn

from rlhf.errors import ConfigError
from rlhf.fp8.backends import reference, te, torchao
from rlhf.fp8.recipes import Gemm, Recipe


class Backend(Protocol):
    @property
    def name(self) -> str: ...

    def obstacle(self, recipe: Recipe) -> str:
        """Why the recipe cannot run here; empty where it can."""
        ...

    def layer(self, linear: nn.Linear, recipe: Recipe, high_precision: frozenset[Gemm]) -> nn.Module: ...


BACKENDS: dict[str, Backend] = {"te": te, "torchao": torchao, "reference": reference}
"""In the order `auto` prefers them. Packages are imported by `obstacle` and `layer`, never before."""


def passed_over(recipe: Recipe) -> str:
    """Why `auto` does not take a backend it would prefer; empty without a GPU, where it prefers none."""
    if not torch.cuda.is_available():
        return ""
    obstacles = ((name, backend.obstacle(recipe)) for name, backend in BACKENDS.items())
    return "; ".join(f"{name}: {why}" for name, why in takewhile(lambda one: one[1], obstacles))


def open_backend(name: str, recipe: Recipe) -> Backend:
    """The backend of a name; `auto` is the first that can do the recipe here, and without a GPU the reference.

    Raises:
        ConfigError: it cannot do the recipe here; the message says why.
    """
    if name == "auto":
        candidates = list(BACKENDS) if torch.cuda.is_available() else ["reference"]
        return next(BACKENDS[one] for one in candidates if not BACKENDS[one].obstacle(recipe))
    if why_not := BACKENDS[name].obstacle(recipe):
        able = ", ".join(other for other, backend in BACKENDS.items() if not backend.obstacle(recipe))
        raise ConfigError(f"fp8.backend {name} cannot do recipe {recipe.name} here: {why_not}. Those that can: {able}")
    return BACKENDS[name]
