"""FP8 layers into a model and out again. Parameters stay the very objects they are: tied, frozen, trained as before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlhf.config.sections import Fp8
from rlhf.fp8.backends import Backend, open_backend, passed_over
from rlhf.fp8.plan import plan, require_any, require_matches
from rlhf.fp8.recipes import recipe_of
from rlhf.fp8.state import layers_in_fp8


def apply(model: nn.Module, config: Fp8) -> None:
    """Puts FP8 layers in place of those the plan names.

    Raises:
        ConfigError: no layer can run in FP8, a pattern of `fp8.keep` matches none, or the backend cannot do the recipe here.
    """
    recipe, decisions = recipe_of(config), plan(model, config)
    require_matches(decisions, config, model)
    require_any(decisions, config, model)
    backend: Backend = open_backend(config.backend, recipe)
    chosen = [one for one in decisions if one.in_fp8]
    linears = [model.get_submodule(one.place) for one in chosen]
    made = [backend.layer(linear, recipe, one.high_precision) for linear, one in zip(linears, chosen, strict=True)]  # pyright: ignore
    _replace(model, linears, made)


def described(model: nn.Module) -> str:
    """What runs in FP8, in one line; empty where nothing does."""
    layers = list(layers_in_fp8(model).values())
    if not layers:
        return ""
    recipe, backend = layers[0].recipe, layers[0].backend
    why = passed_over(recipe) if backend == "reference" else ""
    emulated = f", emulated and slower than BF16 ({why})" if why else ""
    return f"{len(layers)} linear layers in FP8, recipe {recipe.name}, backend {backend}{emulated} (`rlhf fp8 plan` lists them)"


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """FP8 layers compute as nn.Linear in here."""
    layers = [layer for layer in layers_in_fp8(model).values() if layer.enabled]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def is_on(model: nn.Module) -> bool:
    """Whether any layer computes in FP8 at the moment."""
    return any(layer.enabled for layer in layers_in_fp8(model).values())


def undo(model: nn.Module) -> None:
    """Plain nn.Linear layers in place of FP8 ones, with the same parameters."""
    layers = list(layers_in_fp8(model).values())
    _replace(model, layers, [_plain(layer) for layer in layers])


def _plain(layer: Any) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)


def _replace(model: nn.Module, old: Sequence[nn.Module], new: Sequence[nn.Module]) -> None:
    """Each old module by its new one, in every place it stands."""
    successor = dict(zip(old, new, strict=True))
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if module in successor:
            model.set_submodule(place, successor[module])
