"""FP8 layers into a model and out again. Parameters stay the very objects they are: tied, frozen, trained as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rlhf.config.sections import Fp8
from rlhf.errors import ConfigError
from rlhf.fp8.backends import Backend, open_backend
from rlhf.fp8.plan import plan, require_matches, summary
from rlhf.fp8.recipes import recipe_of
from rlhf.fp8.state import layers_in_fp8


def apply(model: nn.Module, config: Fp8) -> None:
    """Puts FP8 layers in place of those the plan names.

    Raises:
        ConfigError: no layer can run in FP8, a pattern of `fp8.keep` matches none, or the backend cannot do the recipe here.
    """
    recipe, decisions = recipe_of(config), plan(model, config)
    require_matches(decisions, config, model)
    backend: Backend = open_backend(config.backend, recipe)
    chosen = [one for one in decisions if one.in_fp8]
    if not chosen:
        raise ConfigError(
            f"fp8.recipe {config.recipe}: no layer of {type(model).__name__} can run in FP8 ({summary(decisions)})"
        )
    for one in chosen:
        _put(model, one.place, backend.layer(model.get_submodule(one.place), recipe, one.high_precision))  # pyright: ignore


def described(model: nn.Module) -> str:
    """What runs in FP8, in one line; empty where nothing does."""
    layers = list(layers_in_fp8(model).values())
    if not layers:
        return ""
    recipe, backend = layers[0].recipe.name, layers[0].backend
    return f"{len(layers)} linear layers in FP8, recipe {recipe}, backend {backend} (`rlhf fp8 plan` lists them)"


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """FP8 layers compute as nn.Linear in here."""
    layers = layers_in_fp8(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def undo(model: nn.Module) -> None:
    """Plain nn.Linear layers in place of FP8 ones, with the same parameters."""
    for place, layer in layers_in_fp8(model).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        plain.train(layer.training)
        _put(model, place, plain)


def _put(model: nn.Module, place: str, module: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
