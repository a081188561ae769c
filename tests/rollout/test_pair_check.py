"""What is said of a reward that was asked about pairs; whole runs are in faults/test_planted_faults.py."""

from __future__ import annotations

import pytest

from rlhf.config.rewards import Reward
from rlhf.errors import CheckFailed
from rlhf.rollout.pair_check import verdict_on_pairs

REWARD = Reward(source="count:a", pairs="pairs.jsonl")


@pytest.mark.parametrize(
    ("right", "count", "said"),
    [
        (30.0, 40, "the reward scores the chosen reply higher in 30 of 40 pairs of pairs.jsonl (95%: 0.60 to 0.86)"),
        (20.5, 40, "warning: the reward scores the chosen reply higher in 20.5 of 40 pairs"),
        (2.0, 2, "warning: the reward scores the chosen reply higher in 2 of 2 pairs of pairs.jsonl (95%: 0.34 to 1.00)"),
        (0.0, 0, "warning: the reward scores the chosen reply higher in 0 of 0 pairs"),
    ],
)
def test_what_is_told(right, count, said):
    """Wilson's formula by hand: 0.7281 +- 0.1300 for 30 of 40, 0.6712 +- 0.3288 for 2 of 2."""
    assert verdict_on_pairs(REWARD, right, count).startswith(said)


def test_the_worse_replies_are_preferred():
    with pytest.raises(CheckFailed, match=r"prefers the worse replies: it scores .* 10 of 40 .* --reward\.gate false"):
        verdict_on_pairs(REWARD, 10.0, 40)
