"""Scaling a matrix so that FP8 can hold it: which numbers share a factor, and what the factor is.

A tile is (rows, columns) of numbers that share a factor; 0 means all there are. Multiplied by its scale, the largest magnitude
of a tile becomes the largest number of the format (or, with powers of two, comes as near to it as such a scale can bring it).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.fp8.formats import Format, encode, rounded_

Tile = tuple[int, int]
Kind = Literal["fp32", "power_of_two", "e8m0"]

WHOLE: Tile = (0, 0)
FLOAT32_LARGEST = torch.finfo(torch.float32).max


class Quantized(NamedTuple):
    """A matrix (M, K) as FP8 sees it: `values` are numbers of the format, and its content is values * factor."""

    values: Tensor
    factor: Tensor | None
    """One number for all of it; None: `values` are scaled back already, tile by tile."""

    def dequantized(self) -> Tensor:
        return self.values if self.factor is None else self.values * self.factor


def scale_of(amax: Tensor, format: Format, margin: int = 0, kind: Kind = "fp32", before: Tensor | None = None) -> Tensor:
    """The multiplier that takes the largest magnitude `amax` to the format's largest number, `margin` powers of two below it.

    Where amax is 0 or not finite nothing can be told, and the scale stays as `before`, or 1. Source: Transformer Engine 2.20,
    common/recipe/recipe_common.cuh, compute_scale_from_amax; e8m0 rounds the exponent up as its MXFP8 does.
    """
    amax = amax.float()
    # torch.div: a Python number over a tensor is computed as reciprocal times number, one bit off in a sixth of cases
    scale = torch.div(torch.full_like(amax, format.largest), amax) / 2.0**margin
    scale = scale.clamp_max(FLOAT32_LARGEST)
    if kind != "fp32":
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    if kind == "e8m0":
        scale = scale.clamp(2.0**-127, 2.0**127)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale) if before is None else before)


def tiled(x: Tensor, tile: Tile) -> Tensor:
    """(M, K) as (M / rows, rows, K / columns, columns), zeros added where a tile hangs over the edge."""
    rows, columns = tile[0] or x.shape[0], tile[1] or x.shape[1]
    below, beside = -x.shape[0] % rows, -x.shape[1] % columns
    if below or beside:
        x = F.pad(x, (0, beside, 0, below))
    return x.view(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def largest_magnitude(x: Tensor) -> Tensor:
    """Of all numbers, 0 of none."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    low, high = x.aminmax()
    return torch.maximum(high, -low).float()


def quantize(x: Tensor, format: Format, scale: Tensor) -> Quantized:
    """A matrix with one scale for all of it."""
    return Quantized(rounded_(x.float() * scale, format), scale.reciprocal())


def quantize_tiles(x: Tensor, format: Format, tile: Tile, kind: Kind) -> Quantized:
    """A matrix with a scale for each tile, taken from the tile itself."""
    parts, scale = _scaled_tiles(x, format, tile, kind)
    values = rounded_(parts * scale, format).mul_(scale.reciprocal())
    return Quantized(_untiled(values, x), None)


def encode_tiles(x: Tensor, format: Format, tile: Tile, kind: Kind = "fp32") -> tuple[Tensor, Tensor]:
    """(codes (M, K) of the format's dtype, factors (M / rows, K / columns) in float32): codes * factor is the content."""
    parts, scale = _scaled_tiles(x, format, tile, kind)
    codes = encode(parts * scale, format).view(torch.uint8)
    return _untiled(codes, x).contiguous().view(format.dtype), scale.reciprocal().squeeze(3).squeeze(1)


def _scaled_tiles(x: Tensor, format: Format, tile: Tile, kind: Kind) -> tuple[Tensor, Tensor]:
    parts = tiled(x.float(), tile)
    amax = parts.abs().amax((1, 3), keepdim=True) if parts.numel() else parts.new_zeros(parts.shape[0], 1, parts.shape[2], 1)
    return parts, scale_of(amax, format, kind=kind)


def _untiled(parts: Tensor, like: Tensor) -> Tensor:
    whole = parts.view(parts.shape[0] * parts.shape[1], parts.shape[2] * parts.shape[3])
    return whole if whole.shape == like.shape else whole[: like.shape[0], : like.shape[1]]
