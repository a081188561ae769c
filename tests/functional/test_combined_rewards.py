"""Several scores into one, against numpy; the penalty on length, against DAPO's equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.functional.rewards import combine_scores, disagreement, penalize_length

SCORES = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
MEMBERS = SCORES.numpy() * np.array([[1.0], [-0.5], [2.0]])

BY_NUMPY = {
    "sum": np.sum(MEMBERS, axis=0),
    "mean": np.mean(MEMBERS, axis=0),
    "min": np.min(MEMBERS, axis=0),
    "mean_minus_std": np.mean(MEMBERS, axis=0) - 0.7 * np.std(MEMBERS, axis=0),
}


@pytest.mark.parametrize("rule", BY_NUMPY)
def test_rules_are_those_of_numpy(rule):
    ours = combine_scores(SCORES, WEIGHTS, rule, 0.7)
    np.testing.assert_allclose(ours.numpy(), BY_NUMPY[rule], rtol=0, atol=1e-14)
    np.testing.assert_allclose(disagreement(SCORES, WEIGHTS).numpy(), np.std(MEMBERS, axis=0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", BY_NUMPY)
def test_one_member_is_the_single_model(rule):
    one = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(combine_scores(one, torch.ones(1), rule, 3.0), one[0])


def test_the_soft_overlong_punishment_of_dapo():
    """Equation 13 as it is printed, with the sizes of the paper: at most 16384 + 4096 tokens."""
    longest, cache = 20480, 4096
    lengths = torch.tensor([1, 16384, 16385, 18432, 20479, 20480])

    def printed(length: int) -> float:
        if length <= longest - cache:
            return 0.0
        return ((longest - cache) - length) / cache if length <= longest else -1.0

    scores = torch.arange(6, dtype=torch.float64)
    expected = scores + torch.tensor([printed(length) for length in lengths.tolist()], dtype=torch.float64)
    ours = penalize_length(scores, lengths, penalty=1 / cache, budget=longest - cache)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    assert ours[-1] == 4.0
    assert torch.equal(penalize_length(scores, lengths, 0.5, 20478), torch.tensor([0, 1, 2, 3, 3.5, 4], dtype=torch.float64))
