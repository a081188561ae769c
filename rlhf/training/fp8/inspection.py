"""What each operand of each linear layer loses in FP8, under one recipe and under all others: one look, the same tensors.

The model itself runs in high precision, forward and backward; its layers show their operands, which are then quantised as each
recipe would. Under delayed scaling the scale of a micro-batch follows from those before it, which begin with rows of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from rlhf.fp8.formats import E4M3, Format, rounded_
from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.plan import plain_name
from rlhf.fp8.recipes import GEMMS, OPERANDS, Gemm, Operand, Recipe
from rlhf.fp8.scaling import WHOLE, scale_of, tiled
from rlhf.fp8.state import fp8_layers

PRODUCTS: dict[Operand, tuple[Gemm, Gemm]] = {
    "activation": ("fprop", "wgrad"),
    "weight": ("fprop", "dgrad"),
    "gradient": ("dgrad", "wgrad"),
}
"""Where an operand takes part; along another dimension in each, so it may be rounded differently."""

SQNR_LIMITS = {"E4M3": (28.0, 22.0), "E5M2": (22.0, 17.0)}
"""dB below which to warn, and below which it is an error. Healthy: 31.5 and 25.5."""
COSINE_LIMITS = {"E4M3": (0.999, 0.99), "E5M2": (0.997, 0.99)}
UNDERFLOW_LIMITS = {"activation": 0.01, "weight": 0.01, "gradient": 0.05}
OVERFLOW_LIMIT = 1e-4
"""Under delayed scaling; under any other nothing may overflow."""
CLIPPED = 1 + 1e-6
"""A largest magnitude times its own scale may exceed the format by the rounding of a float32."""


@dataclass
class QuantizationError:
    """What rounding did to one operand in one product, over all micro-batches."""

    signal: float = 0.0
    noise: float = 0.0
    rounded: float = 0.0
    dot: float = 0.0
    nonzero: int = 0
    vanished: int = 0
    clipped: int = 0
    count: int = 0
    amax: float = 0.0
    smallest_scale: float = math.inf
    largest_scale: float = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, format: Format, scale: Tensor, count: int) -> None:
        """x (tiles) and the scale of each; `count` of its numbers are real, the others fill up tiles with zeros."""
        scaled = x * scale
        clipped = scaled.abs() > format.largest * CLIPPED
        values = rounded_(scaled, format) / scale
        self.signal += float(x.square().sum(dtype=torch.float64))
        self.noise += float((values - x).square().sum(dtype=torch.float64))
        self.rounded += float(values.square().sum(dtype=torch.float64))
        self.dot += float((values * x).sum(dtype=torch.float64))
        self.nonzero += int((x != 0).sum())
        self.vanished += int(((values == 0) & (x != 0)).sum())
        self.clipped += int(clipped.sum())
        self.count += count
        self.amax = max(self.amax, float(x.abs().max()))
        used = scale[x.abs().amax((1, 3), keepdim=True) > 0]  # the scale of a tile of zeros is 1, which says nothing
        if used.numel():
            self.smallest_scale = min(self.smallest_scale, float(used.min()))
            self.largest_scale = max(self.largest_scale, float(used.max()))

    @property
    def sqnr(self) -> float:
        """Signal over quantisation noise, dB."""
        if not math.isfinite(self.signal + self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    @property
    def cosine(self) -> float:
        norm = math.sqrt(self.signal) * math.sqrt(self.rounded)
        return self.dot / norm if norm else float(not self.signal)


@dataclass(frozen=True)
class Finding:
    """One operand of one layer under the recipe at hand; of its products the one that loses more."""

    layer: str
    operand: Operand
    gemm: Gemm
    format: str
    amax: float
    scale_min: float
    scale_max: float
    underflow: float
    overflow: float
    sqnr_db: float
    cosine: float
    level: str
    why: str
    what_if: dict[str, float] = field(default_factory=dict)
    """SQNR in dB under each recipe."""


class Watch:
    """Shown the operands of one layer, keeps sums for every recipe."""

    def __init__(self, layer: FP8Linear, recipes: Sequence[Recipe]) -> None:
        self.recipes = recipes
        self.kept = layer.high_precision
        self.not_in_fp8 = self.kept if layer.weight.requires_grad else self.kept | {"wgrad"}
        self.counting = False
        """Whether what is shown is measured, or only remembered for delayed scales."""
        self.amax_before: dict[Operand, list[Tensor]] = {operand: [] for operand in OPERANDS}
        self.losses: dict[tuple[str, Operand, Gemm], QuantizationError] = {}

    def __call__(self, operand: Operand, x: Tensor) -> None:
        x = x.detach().float()
        before = self.amax_before[operand]
        if self.counting and not (operand == "weight" and (self.recipes[0].name, operand, "fprop") in self.losses):
            for recipe in self.recipes:
                if not (recipe.delayed and not before):
                    self._measure(recipe, operand, x, before)
        before.append(x.abs().max())

    def _measure(self, recipe: Recipe, operand: Operand, x: Tensor, before: Sequence[Tensor]) -> None:
        for gemm in PRODUCTS[operand]:
            parts = tiled(x, tile := recipe.tile_of(operand, gemm))
            amax = parts.abs().amax((1, 3), keepdim=True)
            if recipe.delayed:
                remembered = before[-recipe.amax_history :] if recipe.amax_algorithm == "max" else before[-1:]
                amax = torch.stack(list(remembered)).max().view(1, 1, 1, 1)
            format, margin = recipe.format_of(operand), recipe.margin if tile == WHOLE else 0
            loss = self.losses.setdefault((recipe.name, operand, gemm), QuantizationError())
            loss.add(parts, format, scale_of(amax, format, margin, recipe.kind), x.numel())

    def worst(self, recipe: str, operand: Operand) -> tuple[Gemm, QuantizationError] | None:
        seen: list[tuple[Gemm, QuantizationError]] = [
            (gemm, loss) for gemm in PRODUCTS[operand] if (loss := self.losses.get((recipe, operand, gemm)))
        ]
        used: list[tuple[Gemm, QuantizationError]] = [pair for pair in seen if pair[0] not in self.not_in_fp8]
        return min(used, key=lambda pair: pair[1].sqnr, default=None)


def inspect(
    model: nn.Module,
    recipe: Recipe,
    others: Sequence[Recipe],
    run: Callable[[], object],
    before: Callable[[], object] = lambda: None,
) -> list[Finding]:
    """Findings, the worst first.

    Args:
        model: with FP8 layers of `recipe`.
        others: recipes to compare with.
        run: forward and backward over some micro-batches.
        before: the same over others, which delayed scales follow from; without it the first micro-batch has none.
    """
    recipes = [recipe, *(other for other in others if other.name != recipe.name)]
    watches = {plain_name(name): Watch(layer, recipes) for name, layer in fp8_layers(model).items()}
    for layer, watch in zip(fp8_layers(model).values(), watches.values(), strict=True):
        layer.observe, layer.high_precision = watch, frozenset(GEMMS)
    try:
        before()
        for watch in watches.values():
            watch.counting = True
        run()
    finally:
        for layer, watch in zip(fp8_layers(model).values(), watches.values(), strict=True):
            layer.observe, layer.high_precision = None, watch.kept
    found = [one for name, watch in watches.items() for one in _findings(name, watch, recipe)]
    order = {"error": 0, "warn": 1, "ok": 2}
    return sorted(found, key=lambda one: (order[one.level], one.sqnr_db - SQNR_LIMITS[one.format][0]))


def _findings(name: str, watch: Watch, recipe: Recipe) -> Iterator[Finding]:
    for operand in OPERANDS:
        if (worst := watch.worst(recipe.name, operand)) is None:
            continue
        gemm, loss = worst
        format = recipe.format_of(operand).name
        level, why = judged(loss, operand, format, recipe.delayed)
        in_recipe = partial(watch.worst, operand=operand)
        yield Finding(
            layer=name,
            operand=operand,
            gemm=gemm,
            format=format,
            amax=loss.amax,
            scale_min=loss.smallest_scale,
            scale_max=loss.largest_scale,
            underflow=loss.vanished / max(loss.nonzero, 1),
            overflow=loss.clipped / max(loss.count, 1),
            sqnr_db=loss.sqnr,
            cosine=loss.cosine,
            level=level,
            why=why,
            what_if={one.name: there[1].sqnr for one in watch.recipes if (there := in_recipe(one.name))},
        )


def judged(loss: QuantizationError, operand: Operand, format: str = E4M3.name, delayed: bool = False) -> tuple[str, str]:
    """(ok, warn or error; what stands out)."""
    errors, warnings = [], []
    for what, value, (warn, error) in (
        ("SQNR", loss.sqnr, SQNR_LIMITS[format]),
        ("cosine", loss.cosine, COSINE_LIMITS[format]),
    ):
        if value < error or value != value:
            errors.append(what)
        elif value < warn:
            warnings.append(what)
    if loss.vanished > UNDERFLOW_LIMITS[operand] * loss.nonzero:
        warnings.append("underflow")
    if loss.clipped > (OVERFLOW_LIMIT * loss.count if delayed else 0):
        (warnings if delayed else errors).append("overflow")
    return "error" if errors else "warn" if warnings else "ok", ", ".join(errors + warnings)
