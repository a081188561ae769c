"""Rows A-D together: one PPO step, from rollouts to losses, against sums written out in numpy.

The reference below shares no line with the library: it goes token by token over responses without pads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rlhf.functional.advantages import gae
from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.masked import Moments, whiten
from rlhf.functional.ppo import policy_loss, value_loss
from rlhf.functional.rewards import token_rewards

Array = NDArray[np.float64]

TEMPERATURE, COEF, GAMMA, LAM, CLIP, VALUE_CLIP = 0.7, 0.15, 0.98, 0.9, 0.2, 0.25
LENGTHS = [6, 1, 4, 0, 3]


@dataclass(frozen=True)
class Rollouts:
    """Fixed random rollouts: logits of three policies, two sets of values, a score a row."""

    tokens: NDArray[np.int64]
    old_logits: Array
    new_logits: Array
    reference_logits: Array
    old_values: Array
    new_values: Array
    scores: Array


def random_rollouts(seed: int) -> Rollouts:
    rng = np.random.default_rng(seed)
    rows, length, vocabulary = len(LENGTHS), max(LENGTHS) + 2, 7
    old_logits = rng.normal(size=(rows, length, vocabulary))
    old_values = rng.normal(size=(rows, length))
    return Rollouts(
        tokens=rng.integers(0, vocabulary, size=(rows, length)),
        old_logits=old_logits,
        new_logits=old_logits + 0.3 * rng.normal(size=old_logits.shape),
        reference_logits=old_logits + 0.5 * rng.normal(size=old_logits.shape),
        old_values=old_values,
        new_values=old_values + 0.4 * rng.normal(size=old_values.shape),
        scores=rng.normal(size=rows),
    )


def expected_step(r: Rollouts) -> dict[str, float]:
    def logprob(logits: Array, row: int, t: int) -> float:
        weights = np.exp(logits[row, t] / TEMPERATURE)
        return float(np.log(weights[r.tokens[row, t]] / weights.sum()))

    places = [(row, t) for row, length in enumerate(LENGTHS) for t in range(length)]
    old = {place: logprob(r.old_logits, *place) for place in places}
    new = {place: logprob(r.new_logits, *place) for place in places}
    reference = {place: logprob(r.reference_logits, *place) for place in places}

    reward = {place: -COEF * (old[place] - reference[place]) for place in places}
    for row, length in enumerate(LENGTHS):
        if length > 0:
            reward[row, length - 1] += r.scores[row]

    def delta(row: int, t: int) -> float:
        next_value = r.old_values[row, t + 1] if t + 1 < LENGTHS[row] else 0.0
        return reward[row, t] + GAMMA * next_value - r.old_values[row, t]

    raw = {(row, t): sum((GAMMA * LAM) ** (j - t) * delta(row, j) for j in range(t, LENGTHS[row])) for row, t in places}
    mean = sum(raw.values()) / len(places)
    variance = sum((a - mean) ** 2 for a in raw.values()) / len(places)
    advantage = {place: (a - mean) / np.sqrt(variance + 1e-8) for place, a in raw.items()}

    totals: dict[str, float] = dict.fromkeys(
        ("policy", "value", "approx_kl", "clip_fraction", "ratio", "value_clip_fraction"), 0.0
    )
    for place in places:
        ratio = np.exp(new[place] - old[place])
        surrogate = min(advantage[place] * ratio, advantage[place] * min(max(ratio, 1 - CLIP), 1 + CLIP))
        totals["policy"] -= surrogate
        totals["approx_kl"] += (new[place] - old[place]) ** 2 / 2
        totals["clip_fraction"] += not 1 - CLIP <= ratio <= 1 + CLIP
        totals["ratio"] += ratio

        value, old_value, target = r.new_values[place], r.old_values[place], raw[place] + r.old_values[place]
        clipped = min(max(value, old_value - VALUE_CLIP), old_value + VALUE_CLIP)
        totals["value"] += max((value - target) ** 2, (clipped - target) ** 2) / 2
        totals["value_clip_fraction"] += value != clipped
    return totals


def actual_step(r: Rollouts, splits: list[slice]) -> dict[str, float]:
    """The same with the library, every slice of rows standing for a rank or a micro-batch."""
    length = r.tokens.shape[1]
    mask = (torch.arange(length) < torch.tensor(LENGTHS).unsqueeze(-1)).long()
    tokens = torch.from_numpy(r.tokens)

    def logprobs(logits: Array, rows: slice) -> torch.Tensor:
        return token_logprobs(torch.from_numpy(logits[rows]), tokens[rows], TEMPERATURE)

    credits, moments = [], Moments.empty()
    for rows in splits:
        old, reference = logprobs(r.old_logits, rows), logprobs(r.reference_logits, rows)
        rewards = token_rewards(torch.from_numpy(r.scores[rows]), old, reference, mask[rows], COEF)
        advantages, returns = gae(rewards, torch.from_numpy(r.old_values[rows]), mask[rows], GAMMA, LAM)
        moments = moments.merge(Moments.of(advantages, mask[rows]))
        credits.append((rows, old, advantages, returns))

    totals: dict[str, float] = {}
    for rows, old, advantages, returns in credits:
        advantages = whiten(advantages, mask[rows], moments)
        policy, stats = policy_loss(logprobs(r.new_logits, rows), old, advantages, mask[rows], CLIP)
        old_values, new_values = torch.from_numpy(r.old_values[rows]), torch.from_numpy(r.new_values[rows])
        value, value_stats = value_loss(new_values, old_values, returns, mask[rows], VALUE_CLIP)
        sums = {
            "policy": policy,
            "value": value,
            "approx_kl": stats["approx_kl"],
            "clip_fraction": stats["clip_fraction"],
            "ratio": stats["ratio"],
            "value_clip_fraction": value_stats["clip_fraction"],
        }
        totals = {name: totals.get(name, 0.0) + number.item() for name, number in sums.items()}
    return totals


SPLITS = {
    "whole": [slice(0, 5)],
    "two": [slice(0, 2), slice(2, 5)],
    "rows": [slice(i, i + 1) for i in range(5)],
}


@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("seed", range(4))
def test_step_equals_the_definition(seed: int, splits: list[slice]) -> None:
    rollouts = random_rollouts(seed)
    expected, actual = expected_step(rollouts), actual_step(rollouts, splits)
    assert expected["clip_fraction"] > 0
    assert expected["value_clip_fraction"] > 0
    assert actual == pytest.approx(expected, rel=0, abs=1e-10)
