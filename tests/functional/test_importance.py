"""Truncated importance weights against their definition, and the policy loss they weigh."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.functional.importance import importance_weights
from rlhf.functional.ppo import policy_loss

LOG = math.log


def test_weights_by_hand():
    """Ratios 2, 1/2, 1, 3 under a cap of 2: the last is capped, the first is not; outside the mask may stand anything."""
    logprobs = torch.tensor([[LOG(0.4), LOG(0.1), LOG(0.3)], [LOG(0.6), -torch.inf, torch.nan]], requires_grad=True)
    sampled = torch.tensor([[LOG(0.2), LOG(0.2), LOG(0.3)], [LOG(0.2), 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    weights, stats = importance_weights(logprobs, sampled, mask, cap=2.0)
    assert torch.allclose(weights, torch.tensor([[2.0, 0.5, 1.0], [2.0, 0.0, 0.0]]), atol=1e-6)
    assert not weights.requires_grad
    assert float(stats["importance_weight"]) == pytest.approx(5.5)
    assert int(stats["importance_capped"]) == 1


def test_equal_logprobs_weigh_exactly_one():
    logprobs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    weights, stats = importance_weights(logprobs, logprobs.clone(), torch.ones(3, 5), cap=1.0)
    assert (weights == 1).all()
    assert int(stats["importance_capped"]) == 0


def test_a_log_weight_too_large_for_exp_is_capped():
    weights, stats = importance_weights(torch.zeros(1, 1), torch.full((1, 1), -1e4), torch.ones(1, 1), cap=5.0)
    assert float(weights) == pytest.approx(5.0)
    assert int(stats["importance_capped"]) == 1


def test_they_make_an_expectation_right():
    """sum q(x) min(p / q, cap) f(x) is sum p(x) f(x) where no ratio passes the cap, and less where one does (f > 0)."""
    p, q, f = (torch.tensor(x) for x in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [1.0, 4.0, 2.0]))
    right = float((p * f).sum())

    def estimate(cap: float) -> float:
        weights, _ = importance_weights(p.log()[None], q.log()[None], torch.ones(1, 3), cap)
        return float((q * weights[0] * f).sum())

    assert estimate(10.0) == pytest.approx(right, rel=1e-6)
    assert estimate(2.0) == pytest.approx(0.2 * 2.0 * 1 + 0.3 * 4 + 0.2 * 2, rel=1e-6)


def test_the_loss_and_its_gradient_are_weighed_token_by_token():
    """On policy the loss is -sum w A and its gradient in the log-prob -w A, whatever stands outside the mask."""
    old = torch.tensor([[-1.0, -2.0, -3.0]])
    logprobs = old.clone().requires_grad_()
    advantages, mask = torch.tensor([[1.0, -2.0, 5.0]]), torch.tensor([[1, 1, 0]])
    weights = torch.tensor([[0.5, 2.0, torch.nan]])
    loss, stats = policy_loss(logprobs, old, advantages, mask, 0.2, weights)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 * 1.0 + 2.0 * -2.0))
    assert logprobs.grad.tolist() == [[-0.5, 4.0, 0.0]]
    plain, plain_stats = policy_loss(old, old, advantages, mask, 0.2)
    assert plain.item() == pytest.approx(1.0)
    assert stats.keys() == plain_stats.keys()  # of the ratio, which no weight is part of
    assert all(torch.equal(stats[name], plain_stats[name]) for name in stats)
