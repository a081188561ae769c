"""The reward model's loss, its accuracy with the interval of that, and its calibration: rows F1 and F2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.functional.preference import (
    accuracy,
    bradley_terry_loss,
    calibration_error,
    center_penalty,
    correlation,
    reliability,
    smoothed,
    wilson_interval,
)


def pairs(*rows: tuple[float, float]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(rows, dtype=torch.float64)
    return table[:, 0], table[:, 1]


def test_f1_tie_and_margin_of_two() -> None:
    loss = bradley_terry_loss(*pairs((3.0, 3.0), (1.5, -0.5)))
    assert loss.tolist() == pytest.approx([0.6931471805599453, 0.1269280110429725], abs=1e-12)


def test_f1_a_constant_in_both_scores_changes_nothing() -> None:
    chosen, rejected = pairs((0.5, 0.25), (-1.0, 2.0))
    assert torch.equal(bradley_terry_loss(chosen + 4, rejected + 4), bradley_terry_loss(chosen, rejected))


def test_f1_swapping_flips_the_sign_of_the_difference() -> None:
    chosen, rejected = pairs((0.5, 0.2), (-1.0, 2.0), (3.0, 1.0), (2.0, 1.0))
    # -log s(x) + log s(-x) = -x for every x
    flipped = bradley_terry_loss(chosen, rejected) - bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close(flipped, rejected - chosen, rtol=0, atol=1e-12)
    assert accuracy(rejected, chosen).mean() == 1 - accuracy(chosen, rejected).mean()


def test_f1_a_margin_is_taken_off_the_difference() -> None:
    chosen, rejected = pairs((2.0, 0.0), (2.0, 0.0))
    assert bradley_terry_loss(chosen, rejected, 2.0).tolist() == pytest.approx([math.log(2)] * 2)
    per_pair = bradley_terry_loss(chosen, rejected, torch.tensor([0.0, 2.0]).double())
    assert per_pair.tolist() == pytest.approx([0.1269280110429725, math.log(2)])


def test_f1_extreme_differences_stay_finite() -> None:
    assert bradley_terry_loss(*pairs((1e4, -1e4), (-1e4, 1e4))).tolist() == [0.0, 2e4]


def test_f1_accuracy_counts_a_tie_as_one_half() -> None:
    assert accuracy(*pairs((1.0, 0.0), (0.0, 1.0), (2.0, 2.0))).tolist() == [1.0, 0.0, 0.5]


def labelled_pairs(flipped: float) -> tuple[Tensor, Tensor]:
    """4000 pairs of points which a plane orders, chosen and rejected, each label wrong with probability `flipped`."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 4000, 3, generator=generator, dtype=torch.float64)
    first_is_better = points[0].sum(dim=-1) > points[1].sum(dim=-1)
    is_flipped = torch.rand(4000, generator=generator) < flipped
    first_is_chosen = (first_is_better != is_flipped).unsqueeze(-1)
    return torch.where(first_is_chosen, points[0], points[1]), torch.where(first_is_chosen, points[1], points[0])


def learned_accuracy(flipped: float) -> tuple[Tensor, Tensor]:
    """Accuracy per pair of a linear score learned on the first half of the pairs: on that half, and on the other."""
    chosen, rejected = labelled_pairs(flipped)
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=30)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(chosen[:2000] @ weight, rejected[:2000] @ weight).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    correct = accuracy(chosen @ weight.detach(), rejected @ weight.detach())
    return correct[:2000], correct[2000:]


def test_f2_separable_pairs_are_learned() -> None:
    trained, _ = learned_accuracy(flipped=0.0)
    assert trained.mean() == 1.0


@pytest.mark.parametrize("flipped", [0.1, 0.3, 0.5])
def test_f2_flipped_labels_set_a_ceiling(flipped: float) -> None:
    # At 0.5 the labels are shuffled, and nothing can be learned from them.
    _, held_out = learned_accuracy(flipped)
    low, high = wilson_interval(held_out.sum().item(), 2000, z=3.0)
    assert low < 1 - flipped < high
    assert high - low < 0.1  # narrow enough to tell the three apart


@pytest.mark.parametrize(("successes", "trials"), [(0.0, 1), (0.0, 10), (10.0, 10), (8.0, 10), (1.5, 4), (629.0, 1000)])
def test_wilson_ends_solve_their_equation(successes: float, trials: int) -> None:
    # Wilson's interval holds the rates p that are z standard errors (of p itself) or less from the observed rate.
    z = 1.959964
    low, high = wilson_interval(successes, trials)
    assert 0 <= low < high <= 1
    for end in (low, high):
        assert (successes / trials - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / trials, abs=1e-12)


def test_wilson_known_values() -> None:
    # No success in n trials: 0 .. z^2 / (n + z^2).
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson_interval(8.0, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


LN2 = 0.6931471805599453


def test_a_tie_is_least_where_both_score_alike() -> None:
    # Half of -log s(2) = 0.126928 and half of -log s(-2) = 2.126928.
    chosen, rejected = pairs((3.0, 3.0), (1.5, -0.5), (-0.5, 1.5), (1e4, 0.0))
    loss = bradley_terry_loss(chosen, rejected, target=0.5)
    assert loss.tolist() == pytest.approx([LN2, 1.1269280110429725, 1.1269280110429725, 5e3], abs=1e-12)
    chosen.requires_grad_()
    bradley_terry_loss(chosen, rejected, target=0.5).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([0.0, 0.380797077977882, -0.380797077977882, 0.5])  # s(x) - 1/2


def test_smoothing_puts_the_optimum_at_the_odds_of_a_right_label() -> None:
    target = smoothed(torch.tensor([1.0, 0.5, 0.0]).double(), 0.1)
    assert target.tolist() == pytest.approx([0.9, 0.5, 0.1])
    chosen, rejected = pairs((1.5, -0.5), (math.log(9), 0.0))
    chosen.requires_grad_()
    loss = bradley_terry_loss(chosen, rejected, target=target[0].item())
    assert loss[0].item() == pytest.approx(0.9 * 0.1269280110429725 + 0.1 * 2.1269280110429725)
    loss[1].backward()
    assert chosen.grad is not None
    assert chosen.grad[1].item() == pytest.approx(0, abs=1e-15)  # log(0.9 / 0.1) = log 9
    assert smoothed(torch.ones(3), 0.0).tolist() == [1.0] * 3


def test_the_centre_is_the_squared_sum() -> None:
    assert center_penalty(*pairs((1.5, -0.5), (2.0, 1.0), (1.0, -1.0))).tolist() == [1.0, 9.0, 0.0]


def test_reliability_by_hand() -> None:
    # sigmoid(log 1.5) = 0.6, sigmoid(log 9) = 0.9; the second of the three is wrong.
    difference = torch.tensor([math.log(1.5), -math.log(1.5), math.log(9)], dtype=torch.float64)
    table = reliability(difference, torch.tensor([1.0, 3.0, 1.0]).double(), bins=2)
    assert table.tolist() == [pytest.approx([4, 0.6, 0.25]), pytest.approx([1, 0.9, 1.0])]
    assert calibration_error(table).item() == pytest.approx((4 * 0.35 + 1 * 0.1) / 5)
    empty = reliability(difference[2:], torch.ones(1).double(), bins=2)
    assert empty.tolist() == [[0.0, 0.0, 0.0], pytest.approx([1, 0.9, 1.0])]
    certain = reliability(torch.tensor([1e4, 0.0]), torch.ones(2))
    assert certain[-1].tolist() == [1.0, 1.0, 1.0]
    assert certain[0].tolist() == [1.0, 0.5, 0.5]  # a tie of scores is half right, and says so


def test_calibration_finds_a_model_that_is_too_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    difference = 2 * torch.randn(20000, generator=generator, dtype=torch.float64)
    chosen_first = torch.rand(20000, generator=generator, dtype=torch.float64) < difference.sigmoid()  # Bradley and Terry
    by_label = torch.where(chosen_first, difference, -difference)
    errors = [calibration_error(reliability(by_label * scale, torch.ones(20000).double())).item() for scale in (1, 3, 1 / 3)]
    assert errors[0] < 0.015
    assert min(errors[1:]) > 0.1


def test_correlation_is_numpys() -> None:
    x, y = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert correlation(x, y).item() == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1], abs=1e-12)
    assert correlation(x, 3 - 2 * x).item() == pytest.approx(-1)
    assert correlation(x, torch.full_like(x, 0.5)).item() == 0
