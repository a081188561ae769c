"""A reply without a score takes part in nothing: facts A7."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from harness import stage_module
from torch import nn

from rlhf.config.schema import PpoConfig
from rlhf.models.actor_critic import Output
from rlhf.report.stats import Stats
from rlhf.rollout.credit import RunningScores, credit
from rlhf.rollout.experience import Experience, concatenate
from rlhf.rollout.watched import watched

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
KEPT = torch.tensor([True, False, True, True])


def config(**reward: object) -> PpoConfig:
    plain = {"output": "o", "roles": {"actor": "a"}, "data": {"train": "t"}, "reward": {"source": "count:a", **reward}}
    return PpoConfig.model_validate(plain)


def experience(score: float = math.nan, kept: torch.Tensor | None = KEPT) -> Experience:
    """Four replies; `score` is that of the second."""
    draw = torch.Generator().manual_seed(0)

    def numbers() -> torch.Tensor:
        return torch.randn(4, 4, dtype=torch.float64, generator=draw) * MASK

    scores = torch.tensor([1.0, score, -2.0, 0.5])
    prompts, tokens = [[1], [2], [3], [4]], torch.arange(16).view(4, 4)
    of_policies = numbers(), numbers(), numbers(), numbers()
    return Experience(prompts, tokens, MASK, torch.ones(4, dtype=torch.bool), *of_policies, scores, kept=kept)


SHAPING = [{}, {"normalize": "running"}, {"clip": 1.0, "length_penalty": 0.3, "length_budget": 2}, {"weight": -2.0}]


@pytest.mark.parametrize("reward", SHAPING)
@pytest.mark.parametrize("score", [0.0, 1e6, math.inf])
def test_what_it_would_have_scored_changes_nothing(reward, score):
    runs = []
    for value in (math.nan, score):
        running = RunningScores()
        runs.append((*credit(experience(value), config(**reward), 0.05, running), running.state_dict()))
    (one, stats, moments), (other, other_stats, other_moments) = runs
    assert stats == other_stats
    assert moments == other_moments
    for name in ("rewards", "advantages", "returns"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert not getattr(one, name)[~KEPT].any(), name
    assert all(values.isfinite().all() for values in watched(one).values())
    assert stats["reward/masked"] == 1.0


@pytest.mark.parametrize("reward", SHAPING)
def test_the_others_are_as_if_it_were_not_there(reward):
    """Without the row at all, and so without any mask."""
    running, without = RunningScores(), RunningScores()
    found, stats = credit(experience(), config(**reward), 0.05, running)
    alone = replace(experience(0.0, None).rows([0, 2, 3]), kept=None)
    expected, stats_alone = credit(alone, config(**reward), 0.05, without)
    for name in ("rewards", "advantages", "returns"):
        assert torch.allclose(getattr(found, name)[KEPT], getattr(expected, name), rtol=0, atol=1e-12), name
    of_scores = ("reward/score", "reward/score_std", "reward/shaped", "advantage/mean", "value/explained_variance")
    assert {name: stats[name] for name in of_scores} == pytest.approx(
        {name: stats_alone[name] for name in of_scores}, abs=1e-12
    )
    assert running.moments.count == without.moments.count == (3 if reward.get("normalize") else 0)


class Policy(nn.Module):
    """Says what it is told to of the tokens of a batch."""

    def __init__(self, of: Experience) -> None:
        super().__init__()
        mask = of.mask.bool()
        self.logprobs, self.values = nn.Parameter(of.logprobs[mask] + 0.1), nn.Parameter(of.values[mask] - 0.1)

    def forward(self, batch, temperature: float, entropy: bool) -> Output:
        return Output(self.logprobs, self.values)


def test_no_loss_and_no_gradient_comes_of_it():
    stage, found = stage_module("ppo"), credit(experience(), config(), 0.05, RunningScores())[0]
    found = found.weighed(range(4), "tokens", 4)
    stats, policy = Stats(), Policy(found)
    loss = stage.ppo_loss(policy, found, config(), 0.05, stats)
    loss.backward()
    rows = torch.arange(4).unsqueeze(1).expand(4, 4)[MASK.bool()]
    for gradient in (policy.logprobs.grad, policy.values.grad):
        assert gradient is not None
        assert not gradient[rows == 1].any()
        assert gradient[rows != 1].all()
    assert stats.sums["policy/ratio"][1] == int(MASK[KEPT].sum())
    alone = found.rows([0, 2, 3])
    without = stage.ppo_loss(Policy(alone), alone, config(), 0.05, Stats())
    assert float(loss.detach()) == pytest.approx(float(without.detach()), abs=1e-12)


def test_it_stays_with_its_row():
    """Through the division over ranks and back."""
    whole = replace(experience(), components={"one": torch.arange(4.0), "two": -torch.arange(4.0)})
    order = [1, 3, 0, 2]
    parts = [whole.rows([1, 3]), whole.rows([0, 2])]
    again = concatenate(parts, order)
    assert torch.equal(again.scored, KEPT)
    assert torch.equal(again.learned, whole.learned)
    assert again.components["two"].tolist() == [0, -1, -2, -3]
    assert experience(0.0, None).scored.all()
