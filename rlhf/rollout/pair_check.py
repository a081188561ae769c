"""Whether a reward prefers the better replies of pairs: asked before anything is learned, whatever its sources are.

A reward model is judged by its own run (runs/gate.py); a function, a service or a sum of several has no run, and a sign that is
turned shows in no figure of PPO: the score rises all the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlhf.config.rewards import Reward
from rlhf.data.examples import PromptExample
from rlhf.data.rows import read_rows
from rlhf.data.templates import Template
from rlhf.errors import CheckFailed
from rlhf.functional.preference import accuracy, wilson_interval
from rlhf.rollout.engines import Samples
from rlhf.rollout.rewards import CombinedReward

AT_MOST = 256
"""Pairs from the start of the file: of so many the interval is at most 6 points to either side."""


def judged_on_pairs(
    config: Reward, reward: CombinedReward, template: Template, columns: Mapping[str, str], max_line_bytes: int
) -> tuple[float, int]:
    """(pairs of `config.pairs` where the chosen reply scores higher, ties as one half; pairs where both have a score).

    Args:
        columns: that the sources ask for, and who does; the rows of pairs must have them.
    """
    assert config.pairs is not None
    rows = read_rows(config.pairs, "pair", extra_columns="ignore", asked=columns, max_line_bytes=max_line_bytes).rows[:AT_MOST]
    asked = [PromptExample(index, template.prompt(row.fields["prompt"], row.where), row) for index, row in enumerate(rows)]
    scores, kept = [], torch.ones(len(rows), dtype=torch.bool)
    for side in ("chosen", "rejected"):
        replies = [template.response(row.fields["prompt"], row.fields[side], row.where)[1] for row in rows]
        samples = Samples([prompt.ids for prompt in asked], replies, [[]] * len(rows), [True] * len(rows), version=0)
        found = reward(samples, asked)
        scores.append(config.weight * found.scores)
        kept &= found.kept
    chosen, rejected = scores
    return float(accuracy(chosen[kept], rejected[kept]).sum()), int(kept.sum())


def verdict_on_pairs(config: Reward, right: float, count: int) -> str:
    """In words.

    Raises:
        CheckFailed: the worse replies are preferred, by the 95% interval.
    """
    low, high = wilson_interval(right, count)
    told = f"scores the chosen reply higher in {right:g} of {count} pairs of {config.pairs} (95%: {low:.2f} to {high:.2f})"
    if high < 0.5:
        raise CheckFailed(
            f"the reward prefers the worse replies: it {told}. The sign of a source or of a weight is turned, or `chosen` and "
            "`rejected` are exchanged in the pairs; PPO would make replies worse while the score rises. Turn the sign (a "
            "negative reward.weight does), or mend the pairs; to go on all the same: --reward.gate false"
        )
    if low <= 0.5:
        return f"warning: the reward {told}: that is not told from a coin; give more pairs, or look at what it scores"
    return f"the reward {told}"
