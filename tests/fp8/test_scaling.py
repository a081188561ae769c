"""Scales and tiles against numbers worked out by hand and loops over tiles."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.fp8.formats import E4M3, E5M2, encode
from rlhf.fp8.scaling import WHOLE, encode_tiles, largest_magnitude, quantize, quantize_tiles, scale_of


@pytest.mark.parametrize(
    ("amax", "margin", "kind", "expected"),
    [
        (1.0, 0, "fp32", 448.0),
        (7.0, 0, "fp32", 64.0),
        (7.0, 2, "fp32", 16.0),
        (1.0, 0, "power_of_two", 256.0),  # 448 would be full; 2^8 is the largest power that fits
        (1.75, 0, "power_of_two", 256.0),  # 448 / 1.75 = 256 exactly
        (1.76, 0, "power_of_two", 128.0),
        (448.0, 0, "e8m0", 1.0),
        (449.0, 0, "e8m0", 0.5),
        (0.0, 0, "fp32", 1.0),
        (math.inf, 0, "fp32", 1.0),
        (math.nan, 0, "fp32", 1.0),
        (1e-45, 0, "fp32", torch.finfo(torch.float32).max),
        (1e-45, 0, "e8m0", 2.0**127),
    ],
)
def test_scale(amax, margin, kind, expected):
    assert float(scale_of(torch.tensor(amax), E4M3, margin, kind)) == expected


def test_what_cannot_be_told_stays_as_before():
    amax = torch.tensor([0.0, math.inf, math.nan, 57344.0])
    before = torch.tensor([3.0, 5.0, 7.0, 9.0])
    assert scale_of(amax, E5M2, before=before).tolist() == [3.0, 5.0, 7.0, 1.0]


def test_the_scale_is_a_true_quotient():
    """float / tensor is reciprocal() * float in torch, one bit off in many cases; numpy divides."""
    amax = torch.rand(3000, generator=torch.Generator().manual_seed(0)) + 0.01
    exact = torch.from_numpy((448.0 / amax.double().numpy()).astype("float32"))
    assert torch.equal(scale_of(amax, E4M3), exact)
    assert not torch.equal(448.0 / amax, exact)  # the trap is there


def by_loop(x, format, tile, kind):
    """(codes, factors) tile by tile."""
    rows, columns = tile[0] or x.shape[0], tile[1] or x.shape[1]
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    factors = torch.zeros(math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / columns))
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            where = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            amax = float(x[where].abs().max())
            scale = 1.0
            if amax > 0 and math.isfinite(amax):
                scale = float(torch.tensor(format.largest / amax).clamp_max(3.4028234663852886e38))
                if kind != "fp32":
                    scale = 2.0 ** math.floor(math.log2(scale))
            codes[where] = encode(x[where] * scale, format).view(torch.uint8)
            factors[i, j] = 1.0 / scale
    return codes, factors


TILES = [WHOLE, (1, 128), (128, 1), (128, 128), (1, 32), (1, 0), (0, 1)]


@pytest.mark.parametrize("kind", ["fp32", "power_of_two"])
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(3, 128), (130, 257), (128, 128), (1, 16), (200, 40)])
def test_tiles(shape, tile, format, kind):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).exp2()
    x[0] = 0  # a whole row of zeros
    x[-1] = 0.3  # a row of equal numbers
    codes, factors = encode_tiles(x, format, tile, kind)
    expected_codes, expected_factors = by_loop(x, format, tile, kind)
    assert torch.equal(codes.view(torch.uint8), expected_codes)
    torch.testing.assert_close(factors, expected_factors, rtol=1.2e-7, atol=0)
    spread = expected_factors.repeat_interleave(tile[0] or shape[0], 0)[: shape[0]]
    spread = spread.repeat_interleave(tile[1] or shape[1], 1)[:, : shape[1]]
    content = quantize_tiles(x, format, tile, kind)
    assert content.factor is None
    torch.testing.assert_close(content.values, expected_codes.view(format.dtype).float() * spread, rtol=1.2e-7, atol=0)


def test_one_scale_keeps_numbers_of_the_format():
    x = torch.tensor([[1.0, -3.0], [0.3, 100.0]])
    quantized = quantize(x, E4M3, torch.tensor(4.0))
    assert torch.equal(quantized.values, encode(x * 4, E4M3).float())
    assert float(quantized.factor) == 0.25
    assert quantized.dequantized()[0].tolist() == [1.0, -3.0]


def test_largest_magnitude():
    assert float(largest_magnitude(torch.tensor([[1.0, -5.0]]))) == 5.0
    assert float(largest_magnitude(torch.empty(0, 4))) == 0.0
    assert math.isnan(float(largest_magnitude(torch.tensor([1.0, math.nan]))))
