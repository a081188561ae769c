"""From scores to advantages: which token gets how much of the praise or the blame.

Works on the experience of all ranks at once (it is small), so that normalising and whitening are global by construction.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.config.rewards import Reward
from rlhf.config.schema import PpoConfig
from rlhf.functional.advantages import gae
from rlhf.functional.kl import k1
from rlhf.functional.masked import Moments, masked_mean, whiten, zero_outside
from rlhf.functional.ppo import explained_variance
from rlhf.functional.rewards import (
    apply_missing_eos,
    clip_scores,
    disagreement,
    normalize_scores,
    penalize_length,
    token_rewards,
)
from rlhf.rollout.experience import Experience


class RunningScores:
    """Moments of every finite score seen so far; part of a training checkpoint."""

    def __init__(self) -> None:
        self.moments = Moments.empty()

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = Moments(**state)


def credit(
    experience: Experience, config: PpoConfig, kl_coef: float, running: RunningScores
) -> tuple[Experience, dict[str, float]]:
    """Adds rewards, advantages (GAE) and returns; the second result is what to report of them, means over all replies.

    A reply without a score takes no part in any of it: its tokens have no reward, advantage or return. Lengths and KL are of
    the policy and not of scores, so they are those of all replies.
    """
    mask, reference = experience.learned, experience.reference_logprobs
    scores = shaped_scores(experience, config.reward, running)
    rewards = token_rewards(scores, experience.logprobs, reference, mask, kl_coef, config.kl.estimator)
    advantages, returns = gae(rewards, experience.values, mask, config.ppo.gamma, config.ppo.lam)
    stats = {
        **score_stats(experience, config.reward),
        "reward/shaped": masked_mean(scores, experience.scored).item(),
        "rollout/length": experience.mask.sum(1).double().mean().item(),
        "rollout/ended": experience.finished.double().mean().item(),
        "rollout/count": float(len(experience)),
        "policy/entropy": -masked_mean(experience.logprobs, experience.mask).item(),
        "value/mean": masked_mean(experience.values, mask).item(),
        "value/explained_variance": float(explained_variance(experience.values, returns, mask)),
        "advantage/mean": masked_mean(advantages, mask).item(),
        "kl/coef": kl_coef,
    }
    if reference is not None:
        stats["kl/sequence"] = sequence_kl(experience)
    if config.ppo.whiten:
        advantages = whiten(advantages, mask, Moments.of(advantages, mask))
    return replace(experience, rewards=rewards, advantages=advantages, returns=returns), stats


def shaped_scores(experience: Experience, config: Reward, running: RunningScores) -> Tensor:
    """(B,) scores after weighting, normalising, clipping, the penalty on length and the rule for replies that never end, in
    this order; of a reply without one, a number that no formula after it looks at."""
    scores = config.weight * zero_outside(experience.scores, experience.scored).to(experience.values.dtype)
    if config.normalize == "running":
        running.moments = running.moments.merge(Moments.of(scores, scores.isfinite() & experience.scored))
        scores = normalize_scores(scores, running.moments)
    scores = clip_scores(scores, config.clip)
    if config.length_penalty:
        scores = penalize_length(scores, experience.mask.sum(1), config.length_penalty, config.length_budget)
    return apply_missing_eos(scores, experience.finished, config.missing_eos, config.missing_eos_value)


def score_stats(experience: Experience, config: Reward) -> dict[str, float]:
    """Mean and deviation of the scores, and of those of each of several sources, over the replies that have them."""
    of_each = {name: scores[~scores.isnan()] for name, scores in experience.components.items()}
    stats = {"reward/masked": float((~experience.scored).sum())}
    for name, scores in {"score": experience.scores[experience.scored], **of_each}.items():
        if len(scores):
            stats |= {f"reward/{name}": scores.mean().item(), f"reward/{name}_std": scores.std(unbiased=False).item()}
    if config.combine != "sum":
        weights = torch.tensor([config.sources[name].weight for name in experience.components])
        members = torch.stack([*experience.components.values()])[:, experience.scored]
        stats["reward/disagreement"] = disagreement(members, weights).mean().item()
    return stats


def sequence_kl(experience: Experience) -> float:
    """Mean over replies of `reply_kl`."""
    return reply_kl(experience).mean().item()


def reply_kl(experience: Experience) -> Tensor:
    """(B,) the k1 estimate of KL(actor || reference) summed over a reply, in nats."""
    assert experience.reference_logprobs is not None
    return zero_outside(k1(experience.logprobs, experience.reference_logprobs), experience.mask).sum(1)
