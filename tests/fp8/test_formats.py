"""Rounding to FP8 against a definition of its own: every number of a format from its bits, and the nearest of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.fp8 import formats
from rlhf.fp8.formats import E4M3, E5M2, encode, rounded_

# sign, exponent and fraction bits of each code, as the OFP8 specification has them
LAYOUT = {"E4M3": (4, 3, 7), "E5M2": (5, 2, 15)}


def numbers_of(name: str) -> np.ndarray:
    """Value of each of the 128 codes without sign, NaN where it is none (infinity counts as none: rounding saturates)."""
    exponent_bits, fraction_bits, bias = LAYOUT[name]
    values = []
    for code in range(128):
        exponent, fraction = code >> fraction_bits, code & (2**fraction_bits - 1)
        if exponent == 0:
            value = fraction / 2**fraction_bits * 2.0 ** (1 - bias)
        else:
            value = (1 + fraction / 2**fraction_bits) * 2.0 ** (exponent - bias)
        special = code == 127 if name == "E4M3" else exponent == 2**exponent_bits - 1
        values.append(np.nan if special else value)
    return np.array(values)


def expected_codes(x: np.ndarray, name: str) -> np.ndarray:
    """Nearest number, the even code where two are as near, the largest for all that is larger; NaN is any NaN code."""
    numbers = numbers_of(name)
    finite = numbers[~np.isnan(numbers)]  # ascending: codes without sign are ordered as their values
    magnitude = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(finite, magnitude), 1, len(finite) - 1)
    low, high = finite[above - 1], finite[above]
    to_low, to_high = magnitude - low, high - magnitude
    even_is_low = (above - 1) % 2 == 0
    code = np.where((to_low < to_high) | ((to_low == to_high) & even_is_low), above - 1, above)
    code = np.where(magnitude >= finite[-1], len(finite) - 1, code)
    return (code + 128 * np.signbit(x)).astype(np.uint8)


def samples(name: str) -> np.ndarray:
    """More than a million float32 values: random over all exponents, every number, every midpoint, and their neighbours."""
    generator = np.random.default_rng(0)
    numbers = numbers_of(name)
    finite = numbers[~np.isnan(numbers)].astype(np.float32)
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    points = np.concatenate([finite, middles])
    near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    spread = generator.standard_normal(600_000).astype(np.float32) * 2.0 ** generator.integers(-24, 20, 600_000).astype(
        np.float32
    )
    bits = generator.integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    extremes = np.array([0.0, np.inf, 3.4e38, 1e-45, 448, 449, 464, 465, 57344, 61439, 61440, 65536], np.float32)
    values = np.concatenate([near, extremes, np.abs(spread), np.abs(bits)])
    values = values[~np.isnan(values)]
    return np.concatenate([values, -values])


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_codes_equal_the_definition(format):
    x = samples(format.name)
    assert len(x) > 1_000_000
    codes = encode(torch.from_numpy(x), format)
    assert codes.dtype == format.dtype
    assert (codes.view(torch.uint8).numpy() == expected_codes(x, format.name)).all()


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_rounded_values_are_those_of_the_codes(format):
    x = samples(format.name)
    signed = np.concatenate([numbers_of(format.name), -numbers_of(format.name)])
    values = rounded_(torch.from_numpy(x.copy()), format).numpy()
    assert (values == signed[expected_codes(x, format.name)]).all()


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_nan_stays(format):
    x = torch.tensor([float("nan"), -float("nan"), 1.0])
    assert encode(x, format).float().isnan().tolist() == [True, True, False]
    assert rounded_(x.clone(), format).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_an_empty_tensor_and_other_dtypes(format):
    assert encode(torch.empty(0, 3), format).shape == (0, 3)
    assert encode(torch.tensor([1.0], dtype=torch.bfloat16), format).float().item() == 1.0


def test_the_definition_itself():
    """Facts from the specification, so that the definition above is not wrong in the same way."""
    e4m3, e5m2 = numbers_of("E4M3"), numbers_of("E5M2")
    assert (np.nanmax(e4m3), np.nanmin(e4m3[1:])) == (448, 2.0**-9)
    assert (np.nanmax(e5m2), np.nanmin(e5m2[1:])) == (57344, 2.0**-16)
    for name, dtype in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)):
        codes = torch.arange(128, dtype=torch.uint8).view(dtype).float().numpy()
        numbers = numbers_of(name)
        assert (codes == numbers)[~np.isnan(numbers)].all()


def test_without_saturation_it_fails(monkeypatch):
    """Negative control: the same rounding without its first line."""
    source = torch.tensor([449.0, 1e9, float("inf")])
    assert encode(source, E4M3).float().tolist() == [448, 448, 448]
    monkeypatch.setattr(torch.Tensor, "clamp_", lambda self, *_: self)
    assert formats.rounded_(source.clone(), E4M3).tolist() != [448, 448, 448]
