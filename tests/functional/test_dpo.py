"""The losses of DPO and its kin, against numbers worked out by hand from the papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.functional.dpo import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from rlhf.functional.logprobs import reply_sums


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def test_dpo_of_a_policy_that_is_its_reference_is_ln_2() -> None:
    zero = torch.zeros(2)
    assert dpo_loss(zero, zero, 0.1).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert dpo_loss(zero, zero, 0.1, 0.3).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


def test_dpo() -> None:
    chosen, rejected = numbers(3.0, -1.0), numbers(1.0, 3.0)
    loss = dpo_loss(chosen, rejected, 0.5)
    assert loss.tolist() == pytest.approx([minus_log_sigmoid(1.0), minus_log_sigmoid(-2.0)])
    loss.sum().backward()
    slopes = [-0.5 / (1 + math.exp(1.0)), -0.5 / (1 + math.exp(-2.0))]  # -beta sigmoid(-beta difference): equation 8
    assert chosen.grad.tolist() == pytest.approx(slopes)  # pyright: ignore[reportOptionalMemberAccess]
    assert rejected.grad.tolist() == pytest.approx([-slope for slope in slopes])  # pyright: ignore[reportOptionalMemberAccess]


def test_conservative_dpo_stops_where_the_odds_are_those_of_the_labels() -> None:
    chosen, rejected = numbers(math.log(9.0)), numbers(0.0)
    loss = dpo_loss(chosen, rejected, 1.0, label_smoothing=0.1)  # sigmoid(ln 9) = 0.9
    assert loss.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-12)  # pyright: ignore[reportOptionalMemberAccess]


def test_ipo_aims_at_a_distance() -> None:
    assert ipo_loss(numbers(0.0, 5.0, 7.0), numbers(0.0, 0.0, 0.0), 0.1).tolist() == pytest.approx([25.0, 0.0, 4.0])


def test_simpo_wants_a_margin() -> None:
    chosen, rejected = numbers(-1.0, -1.0), numbers(-1.5, -3.0)
    assert simpo_loss(chosen, rejected, 2.0, 1.0).tolist() == pytest.approx([math.log(2), minus_log_sigmoid(3.0)])


def test_orpo() -> None:
    """P 1/2 has odds 1, P 1/4 has odds 1/3: -log sigmoid(ln 3) is -ln 3/4."""
    loss = orpo_loss(numbers(math.log(0.5)), numbers(math.log(0.25)), 0.1)
    assert loss.item() == pytest.approx(math.log(2) - 0.1 * math.log(0.75))


def test_orpo_of_a_certain_reply_stays_finite() -> None:
    chosen, rejected = numbers(0.0, -1.0), numbers(-1.0, 0.0)
    loss = orpo_loss(chosen, rejected, 0.1)
    loss.sum().backward()
    for found in (loss, chosen.grad, rejected.grad):
        assert found is not None
        assert found.isfinite().all()


def test_kto() -> None:
    desirable = torch.tensor([True, False, True, False])
    loss = kto_loss(numbers(2.0, 2.0, 1.0, 0.0), desirable, 1.0, 0.5, 1.0, 2.0)
    sigmoid = 1 / (1 + math.exp(-0.5))
    assert loss.tolist() == pytest.approx([1 - sigmoid, 2 * sigmoid, 0.5, 2 * (1 - sigmoid)])


def test_sums_of_replies() -> None:
    assert reply_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), [1, 3]).tolist() == [1.0, 14.0]
