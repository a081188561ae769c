"""Which layers, and which of their products, make FP8 differ from high precision: found by putting them in FP8 one by one.

Errors are of the same weights on the same rows. fprop is judged by log-probs, dgrad and wgrad by the gradients of all weights;
each weight counts alike, as one with large gradients would drown the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from rlhf.data.collate import TokenBatch
from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.plan import plain_name
from rlhf.fp8.recipes import GEMMS, Gemm
from rlhf.fp8.state import fp8_layers
from rlhf.training.fp8.sft import Subject

STANDS_OUT = 0.75
"""A keep-list must take away this part of the error,"""
AT_MOST = 0.25
"""with no more than this part of the layers (where all err alike, a quarter of them carries 13% of the error);"""
GROWS = 0.25
"""and takes in one more layer as long as that takes away this part of what is left."""


@dataclass(frozen=True)
class Culprits:
    """Of one product: what its error is with all layers in FP8, and with those of `keep` left out."""

    gemm: Gemm
    error: float
    left: float
    keep: list[str]
    alone: dict[str, float]
    """The error with one layer in FP8, worst first."""


def bisect(
    subject: Subject, batches: Sequence[TokenBatch], advance: Callable[[int, int], None] = lambda *_: None
) -> list[Culprits]:
    """The culprits of each product.

    Args:
        subject: its layers are in FP8; delayed scales stay as they are.
        advance: is told how many of how many looks are done.
    """
    layers = {plain_name(name): layer for name, layer in fp8_layers(subject.roles.actor).items()}
    kept = {name: layer.high_precision for name, layer in layers.items()}
    without_wgrad = {name for name, layer in layers.items() if not layer.weight.requires_grad}
    places: list[tuple[str, Gemm]] = [
        (name, gemm)
        for gemm in GEMMS
        for name in layers
        if gemm not in kept[name] and not (gemm == "wgrad" and name in without_wgrad)
    ]
    state = {name: layer.amax_history.clone() for name, layer in layers.items() if layer.recipe.delayed}
    try:
        _set(layers, "fprop", ())
        plain = subject.logprobs(batches), _gradients(subject, batches)

        def error(gemm: Gemm, names: Sequence[str]) -> float:
            _set(layers, gemm, names)
            if gemm == "fprop":
                return _finite(float((subject.logprobs(batches) - plain[0]).abs().mean()))
            return _distance(_gradients(subject, batches), plain[1])

        found = []
        for gemm in GEMMS:
            alone = {}
            for place in (place for place in places if place[1] == gemm):
                alone[place[0]] = error(gemm, [place[0]])
                advance(places.index(place) + 1, len(places))
            if alone:
                found.append(_keep_list(gemm, alone, error))
        return found
    finally:
        for name, layer in layers.items():
            layer.high_precision = kept[name]
        for name, history in state.items():
            layers[name].amax_history.copy_(history)


def keep_patterns(found: Sequence[Culprits]) -> list[str]:
    """What `fp8.keep` takes: a layer, or one product of it."""
    gemms: dict[str, list[Gemm]] = {}
    for one in found:
        for name in one.keep:
            gemms.setdefault(name, []).append(one.gemm)
    whole = {name for name, kept in gemms.items() if len(kept) == len(GEMMS)}
    return [p for name, kept in gemms.items() for p in ([name] if name in whole else [f"{name}:{gemm}" for gemm in kept])]


def _keep_list(gemm: Gemm, alone: dict[str, float], error: Callable[[Gemm, Sequence[str]], float]) -> Culprits:
    names = sorted(alone, key=lambda name: -alone[name])
    left = [error(gemm, names)]
    enough = (1 - STANDS_OUT) * left[0]
    for length in range(1, int(len(names) * AT_MOST) + 1):
        left.append(error(gemm, names[length:]))
        if left[-2] <= enough and left[-1] > (1 - GROWS) * left[-2]:
            left.pop()
            break
    found = left[0] > 0 and math.isfinite(left[-1]) and left[-1] <= enough  # where all is infinite, nothing is better
    length = len(left) - 1 if found else 0
    return Culprits(gemm, left[0], left[length], names[:length], {name: alone[name] for name in names})


def _set(layers: dict[str, FP8Linear], gemm: Gemm, in_fp8: Sequence[str]) -> None:
    """Of all products, only this one of these layers in FP8."""
    for name, layer in layers.items():
        layer.high_precision = frozenset(GEMMS) - ({gemm} if name in in_fp8 else set())


def _gradients(subject: Subject, batches: Sequence[TokenBatch]) -> dict[str, Tensor]:
    subject.gradients()
    subject.loss(batches)
    return subject.gradients()


def _distance(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """Root mean square over weights of |difference| / |plain gradient|."""
    norms = {name: float(gradient.norm()) for name, gradient in plain.items()}
    parts = [(float((ours[name] - plain[name]).norm()) / norm) ** 2 for name, norm in norms.items() if norm > 0]
    return _finite(math.sqrt(fmean(parts))) if parts else 0.0


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
