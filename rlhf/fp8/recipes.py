"""Recipes: which numbers share a scale, where the scale comes from, and which format each operand takes.

A linear layer has three matrix products: fprop (y = x W^T), dgrad (dx = g W) and wgrad (dW = g^T x). Each multiplies two
operands in FP8, and a tile runs along the dimension the product sums over, so an operand of two products is quantised twice,
but where its tile is the whole tensor or a square.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from rlhf.config.sections import Fp8
from rlhf.fp8.formats import E4M3, E5M2, Format
from rlhf.fp8.scaling import WHOLE, Kind, Tile

Gemm = Literal["fprop", "dgrad", "wgrad"]
Operand = Literal["activation", "weight", "gradient"]

GEMMS: tuple[Gemm, ...] = ("fprop", "dgrad", "wgrad")
OPERANDS: tuple[Operand, ...] = ("activation", "weight", "gradient")


@dataclass(frozen=True)
class Shape:
    """How a recipe divides operands, written as if the product summed over columns."""

    tile: Tile
    """Of activations and gradients."""
    weight: Tile
    kind: Kind
    format: Literal["hybrid", "e4m3"]
    """Where the config leaves it to the recipe."""
    batch_invariant: bool
    """Whether what a token gets depends on that token alone (delayed: since scales do not move within a step)."""


SHAPES: dict[str, Shape] = {
    "delayed": Shape(WHOLE, WHOLE, "fp32", "hybrid", True),
    "current": Shape(WHOLE, WHOLE, "fp32", "hybrid", False),
    "block": Shape((1, 128), (128, 128), "power_of_two", "e4m3", True),
    "rowwise": Shape((1, 0), (1, 0), "fp32", "e4m3", True),
    "mxfp8": Shape((1, 32), (1, 32), "e8m0", "e4m3", True),
}
"""Names and numbers are those of Transformer Engine 2.20 (common/recipe); rowwise is torchao 0.18's, with scales as they come
where its own recipe (float8/config.py) rounds them to powers of two."""


@dataclass(frozen=True)
class Recipe:
    name: str
    tile: Tile
    weight_tile: Tile
    kind: Kind
    forward: Format
    backward: Format
    batch_invariant: bool
    delayed: bool = False
    amax_history: int = 1024
    amax_algorithm: Literal["max", "most_recent"] = "max"
    margin: int = 0
    high_precision: frozenset[Gemm] = frozenset()
    """Products left out of FP8 in every layer."""

    def tile_of(self, operand: Operand, gemm: Gemm) -> Tile:
        """The tile of an operand as it lies in memory: activation (tokens, in), weight (out, in), gradient (tokens, out)."""
        tile = self.weight_tile if operand == "weight" else self.tile
        sums_over_columns = (operand, gemm) in {("activation", "fprop"), ("weight", "fprop"), ("gradient", "dgrad")}
        return tile if sums_over_columns else (tile[1], tile[0])

    def format_of(self, operand: Operand) -> Format:
        return self.backward if operand == "gradient" else self.forward


def recipe_of(config: Fp8) -> Recipe:
    """The recipe a config asks for; `config.recipe` is not `none`."""
    shape = SHAPES[config.recipe]
    format = shape.format if config.format == "auto" else config.format
    return Recipe(
        name=config.recipe,
        tile=shape.tile,
        weight_tile=shape.weight,
        kind="fp32" if shape.kind == "power_of_two" and config.block_scales == "fp32" else shape.kind,
        forward=E4M3,
        backward=E5M2 if format == "hybrid" else E4M3,
        batch_invariant=shape.batch_invariant,
        delayed=config.recipe == "delayed",
        amax_history=config.amax_history,
        amax_algorithm=config.amax_algorithm,
        margin=config.margin,
        high_precision=frozenset(config.high_precision),
    )


def kept_gemms(name: str, patterns: tuple[str, ...]) -> frozenset[Gemm]:
    """The products of the layer that `fp8.keep` leaves in high precision: `PATTERN` all three, `PATTERN:wgrad` one."""
    kept: set[Gemm] = set()
    for pattern in patterns:
        layer, _, gemm = pattern.partition(":")
        if fnmatch(name, layer):
            kept |= {one for one in GEMMS if one == gemm or not gemm}
    return frozenset(kept)
