"""The bootstrap, against the distributions that resampling has by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from binomial import binomial_quantile

from rlhf.functional.intervals import bootstrap_interval


@pytest.mark.parametrize(("successes", "rows"), [(5, 10), (12, 40), (2, 2)])
def test_of_zeros_and_ones_it_is_the_binomial(successes: int, rows: int) -> None:
    """A resample of rows draws each anew: its number of ones is binomial, with the rate that the rows have."""
    values = torch.tensor([1.0] * successes + [0.0] * (rows - successes))
    found = bootstrap_interval(values)
    assert found is not None
    expected = [binomial_quantile(rows, successes / rows, tail) / rows for tail in (0.025, 0.975)]
    assert found == pytest.approx(expected, abs=1e-9)


def test_of_many_rows_it_is_the_normal_interval_of_a_mean() -> None:
    values = torch.randn(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3 + 1
    found = bootstrap_interval(values)
    assert found is not None
    half = 1.959964 * float(values.std()) / math.sqrt(2000)
    assert found == pytest.approx([float(values.mean()) - half, float(values.mean()) + half], abs=0.06 * half)
    narrow = bootstrap_interval(values, level=0.5)
    assert narrow is not None
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6744898 * half / 1.959964, rel=0.06)


def test_counts_make_it_a_ratio() -> None:
    """Two rows, 1 of 1 and 0 of 3: a resample is (1, 1), (1, 0) or (0, 0), 1/4, 1/2 and 1/4 of the time."""
    totals, counts = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0])
    assert bootstrap_interval(totals, counts) == (0.0, 1.0)
    assert bootstrap_interval(totals, counts, level=0.4) == (pytest.approx(0.25), pytest.approx(0.25))
    assert bootstrap_interval(totals, level=0.4) == (0.5, 0.5)  # rows that count alike


def test_rows_that_do_not_differ_leave_no_doubt_and_one_row_says_nothing() -> None:
    assert bootstrap_interval(torch.full((7,), 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(torch.tensor([1.0])) is None
    assert bootstrap_interval(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0])) is None


def test_equal_numbers_have_equal_intervals() -> None:
    values = torch.arange(9.0)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = bootstrap_interval(values)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is the run's own
    torch.manual_seed(2)
    assert bootstrap_interval(values) == first
