"""The state of delayed scaling: plain tensors, moved forward between steps, saved and loaded strictly.

Scales do not move within a step. In PPO a step is a whole iteration, so rollout, old log-probs and all epochs of the update see
the same scales, which keeps the first ratio at exactly 1. Every rank takes the largest magnitude of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf.errors import DataError
from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.recipes import OPERANDS, Recipe
from rlhf.fp8.scaling import scale_of

FIELDS = ("amax_history", "scale")


class DelayedLayer(Protocol):
    """A layer, of whichever backend, whose scales are moved here; FP8Linear says what the tensors hold."""

    recipe: Recipe
    amax_history: Tensor
    scale: Tensor
    calibrating: bool


def fp8_layers(model: nn.Module) -> dict[str, FP8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Linear)}


def layers_in_fp8(model: nn.Module) -> dict[str, Any]:
    """By place, of whichever backend; `fp8_layers` are those of the reference."""
    return {name: module for name, module in model.named_modules() if getattr(module, "is_fp8", False)}


def delayed_layers(model: nn.Module) -> dict[str, DelayedLayer]:
    return {name: layer for name, layer in layers_in_fp8(model).items() if layer.recipe.delayed}


@torch.no_grad()
def advance(model: nn.Module, over_ranks: Callable[[Tensor], Tensor] = lambda amax: amax) -> None:
    """Ends a step: scales follow from the history, and a new row of it begins.

    Args:
        over_ranks: (layers, 3) largest magnitudes of this rank -> those of all ranks.

    Source: Transformer Engine 2.20, common/recipe/delayed_scaling.cu: the row at hand counts, then the history rolls by one.
    """
    _advance(list(delayed_layers(model).values()), over_ranks)


def _advance(layers: Sequence[DelayedLayer], over_ranks: Callable[[Tensor], Tensor] = lambda amax: amax) -> None:
    if not layers:
        return
    latest = over_ranks(torch.stack([layer.amax_history[0] for layer in layers]))
    for layer, amax_now in zip(layers, latest, strict=True):
        history, recipe = layer.amax_history, layer.recipe
        history[0] = amax_now
        amax = history.amax(0) if recipe.amax_algorithm == "max" else history[0]
        for place, operand in enumerate(OPERANDS):
            before = layer.scale[place].clone()
            layer.scale[place] = scale_of(amax[place], recipe.format_of(operand), recipe.margin, before=before)
        if len(history) > 1:
            history.copy_(history.roll(-1, 0))
        history[0].zero_()


def recorded_magnitudes(model: nn.Module) -> list[Tensor]:
    """A copy of what the step at hand has recorded so far."""
    return [layer.amax_history[0].clone() for layer in delayed_layers(model).values()]


def take_back_magnitudes(model: nn.Module, before: Sequence[Tensor]) -> None:
    """Forgets what was recorded since: one infinity would hold a scale for as long as the history is."""
    for layer, row in zip(delayed_layers(model).values(), before, strict=True):
        layer.amax_history[0].copy_(row)


def uncalibrated(model: nn.Module) -> list[DelayedLayer]:
    """Layers whose activation or weight has no scale yet: a new run's, or those a changed config has put into FP8."""
    return [layer for layer in delayed_layers(model).values() if not bool((layer.scale[:2] > 0).all())]


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Gives scales to layers that have none: forwards in here record their magnitudes, gradients or not."""
    layers = uncalibrated(model)
    for layer in layers:
        layer.calibrating = True
    try:
        yield
    finally:
        for layer in layers:
            layer.calibrating = False
    with torch.no_grad():
        _advance(layers)


def forget_weights(model: nn.Module) -> None:
    """After an optimizer step: weights are quantised anew, whichever way an engine wrote them."""
    for layer in fp8_layers(model).values():
        if layer.weight.requires_grad:  # a frozen base, which no step writes, is not quantised again
            layer.forget_weights()


def fp8_state(model: nn.Module) -> dict[str, Tensor]:
    """All there is to save, by `layer.field`; empty for recipes without state."""
    return {f"{name}.{field}": getattr(layer, field) for name, layer in delayed_layers(model).items() for field in FIELDS}


@torch.no_grad()
def load_fp8_state(model: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
    """Puts saved state back. Not `strict`: of what fits; other layers of the model have no scale yet.

    Raises:
        DataError: layers, or the length of the history, are not those it was saved from.
    """
    own = fp8_state(model)
    if not strict:
        own = {name: tensor for name, tensor in own.items() if name in tensors and tensor.shape == tensors[name].shape}
        tensors = {name: tensors[name] for name in own}
    if unlike := set(own) ^ set(tensors):
        where = "is not in the model" if min(unlike) in tensors else "was not saved"
        raise DataError(f"FP8 state: {min(unlike)} {where}; it belongs to another model, or to other fp8 settings")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise DataError(f"FP8 state: {name} is {tuple(tensors[name].shape)}, the model's {tuple(tensor.shape)}")
        tensor.copy_(tensors[name])
