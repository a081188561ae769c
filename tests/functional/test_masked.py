"""Positions, masked reductions, moments and whitening: rows A7, B1-B6, E1, E2 and E12."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.functional.masked import Moments, last_index, masked_mean, masked_sum, whiten

# Whitening of this, keeping its mean, is row B2; the figures are derived with numpy from the definition.
TABLE = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]], dtype=torch.float64)
TABLE_BIASED = torch.tensor(
    [
        [0.05080677770651998, 0.4381050832798903, 0.8254033888532596],
        [1.2127016944266298, 1.6, 1.9872983055733695],
        [2.37459661114674, 2.761894916720109, 3.149193222293479],
    ],
    dtype=torch.float64,
)
TABLE_UNBIASED_FIRST_ROW = torch.tensor([0.13940661069244586, 0.5045549580193347, 0.8697033053462225]).double()


def whiten_alone(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return whiten(x, mask, Moments.of(x, mask), shift_mean=shift_mean)


@pytest.mark.parametrize(
    ("row", "expected"),
    [([0, 0, 1, 1], 3), ([1, 1, 0, 0], 1), ([0, 1, 1, 0], 2), ([1, 1, 1, 1], 3), ([1, 0, 0, 0], 0), ([0, 0, 0, 0], 0)],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_e2_last_index_by_mask_wherever_the_pads_are(row: list[int], expected: int, dtype: torch.dtype) -> None:
    assert last_index(torch.tensor([row], dtype=dtype)).tolist() == [expected]


def test_e2_score_position_when_the_text_holds_the_pad_id() -> None:
    pad = 7
    tokens = torch.tensor([[5, pad, 6, pad, pad, pad]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])  # the fourth token is an EOS with the id of the pad
    first_pad_minus_one = int((tokens[0] == pad).nonzero()[0]) - 1
    assert last_index(mask).tolist() == [3]
    assert first_pad_minus_one == 0  # the wrong way, which this text tells from the right one


@pytest.mark.parametrize("garbage", [1e6, float("inf"), -float("inf"), float("nan")])
def test_a7_masked_positions_do_not_leak(garbage: float) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.tensor([[1.0, 2.0, garbage], [6.0, garbage, garbage]], requires_grad=True)
    assert masked_sum(x, mask).item() == 9.0
    mean = masked_mean(x, mask)
    assert mean.item() == 3.0
    mean.backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, mask / 3)


def test_a7_a_product_with_the_mask_would_leak() -> None:
    assert (torch.tensor([1.0, float("inf")]) * torch.tensor([1, 0])).sum().isnan()


def test_b4_mean_of_nothing_is_zero() -> None:
    x, mask = torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.long)
    assert masked_sum(x, mask).item() == 0.0
    assert masked_mean(x, mask).item() == 0.0


def test_b1_whitened_over_the_mask_whatever_the_pads_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 7, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    clean = whiten_alone(x, mask)
    inside = clean[mask].numpy()
    assert inside.mean() == pytest.approx(0, abs=1e-12)
    assert inside.std() == pytest.approx(1, abs=1e-8)
    for garbage in (1e9, float("inf"), float("nan")):
        assert torch.equal(whiten_alone(x.masked_fill(~mask, garbage), mask), clean)
    assert (clean[~mask] == 0).all()


def test_b2_biased_variance_keeping_the_mean() -> None:
    mask = torch.ones(3, 3, dtype=torch.long)
    whitened = whiten_alone(TABLE, mask, shift_mean=False)
    torch.testing.assert_close(whitened, TABLE_BIASED, rtol=0, atol=1e-12)
    assert whitened.mean().item() == pytest.approx(1.6, abs=1e-12)


def test_b2_unbiased_variance_would_be_noticed() -> None:
    unbiased = (TABLE - TABLE.mean()) / (TABLE.var(correction=1) + 1e-8).sqrt() + TABLE.mean()
    torch.testing.assert_close(unbiased[0], TABLE_UNBIASED_FIRST_ROW, rtol=0, atol=1e-7)
    assert (unbiased - TABLE_BIASED).abs().max() > 0.05


def test_b3_whitened_over_all_ranks() -> None:
    ranks = [torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[10.0, 12.0]]).double()]
    mask = torch.ones(1, 2, dtype=torch.long)
    moments = Moments.empty()
    for x in ranks:
        moments = moments.merge(Moments.of(x, mask))
    whitened = torch.cat([whiten(x, mask, moments) for x in ranks], dim=1)
    expected = [-1.1766968106028164, -0.7844645404018775, 0.7844645404018775, 1.1766968106028164]
    assert whitened[0].tolist() == pytest.approx(expected, abs=1e-12)

    per_rank = torch.cat([whiten_alone(x, mask) for x in ranks], dim=1)  # the bug: every rank by itself
    assert per_rank[0].tolist() == pytest.approx([-0.999999995, 0.999999995] * 2, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        pytest.param([[3.7]], [[1]], id="one token"),
        pytest.param([[0.1, 0.1, 0.1]], [[1, 1, 1]], id="constant"),
        pytest.param([[0.1, float("nan")]], [[0, 0]], id="all masked"),
    ],
)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_b4_degenerate_batches_stay_finite(
    x: list[list[float]], mask: list[list[int]], shift_mean: bool, dtype: torch.dtype
) -> None:
    numbers, real = torch.tensor(x, dtype=dtype), torch.tensor(mask)
    whitened = whiten_alone(numbers, real, shift_mean=shift_mean)
    expected = torch.zeros_like(whitened) if shift_mean else torch.where(real.bool(), numbers, 0.0)
    # eps 1e-8 scales rounding of the mean by 1e4 at most.
    torch.testing.assert_close(whitened, expected, rtol=0, atol=1e4 * torch.finfo(dtype).eps)


def test_b5_whitening_twice_is_whitening_once() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    once = whiten_alone(x, mask)
    torch.testing.assert_close(whiten_alone(once, mask), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_b6_moments_of_parts_are_those_of_the_concatenation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(loc=1e3, scale=rng.uniform(0.1, 10), size=size) for size in rng.integers(0, 6, size=8)]
    whole = np.concatenate(parts)
    merged = Moments.empty()
    for part in parts:
        merged = merged.merge(Moments.of(torch.from_numpy(part)))
        merged = Moments(**asdict(merged))  # as a resumed run reads it back
    assert merged.count == whole.size
    assert merged.mean == pytest.approx(whole.mean(), rel=1e-13)
    assert merged.variance == pytest.approx(whole.var(), rel=1e-10)
    assert merged.std == pytest.approx(whole.std(), rel=1e-10)


def test_b6_merging_nothing_changes_nothing() -> None:
    moments = Moments.of(torch.tensor([0.1, 0.2, 0.7]))
    assert moments.merge(Moments.empty()) == moments
    assert Moments.empty().merge(moments) == moments
    assert Moments.empty().variance == 0.0


def test_b6_moments_are_double_precision_and_know_the_mask() -> None:
    x = torch.tensor([[1e4 + 1, 1e4 + 3, float("nan")]], dtype=torch.float32)
    moments = Moments.of(x, torch.tensor([[True, True, False]]))
    assert (moments.count, moments.mean, moments.m2) == (2.0, 10002.0, 2.0)


def test_b6_mean_of_means_would_be_noticed() -> None:
    parts = [torch.tensor([0.0]), torch.tensor([3.0, 3.0])]
    assert Moments.of(parts[0]).merge(Moments.of(parts[1])).mean == 2.0
    assert (0.0 + 3.0) / 2 == 1.5
