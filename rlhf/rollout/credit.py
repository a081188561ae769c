"""From scores to advantages: which token gets how much of the praise or the blame.

Works on the experience of all ranks at once (it is small), so that normalising and whitening are global by construction.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from rlhf.config.rewards import Reward
from rlhf.config.schema import PpoConfig
from rlhf.functional.advantages import gae
from rlhf.functional.kl import k1
from rlhf.functional.masked import Moments, masked_mean, whiten, zero_outside
from rlhf.functional.ppo import explained_variance
from rlhf.functional.rewards import apply_missing_eos, clip_scores, normalize_scores, token_rewards
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
    """Adds rewards, advantages (GAE) and returns; the second result is what to report of them, means over all replies."""
    mask, reference = experience.mask, experience.reference_logprobs
    scores = shaped_scores(experience, config.reward, running)
    rewards = token_rewards(scores, experience.logprobs, reference, mask, kl_coef, config.kl.estimator)
    advantages, returns = gae(rewards, experience.values, mask, config.ppo.gamma, config.ppo.lam)
    stats = {
        "reward/score": experience.scores.mean().item(),
        "reward/score_std": experience.scores.std(unbiased=False).item(),
        "reward/shaped": scores.mean().item(),
        "rollout/length": mask.sum(1).double().mean().item(),
        "rollout/ended": experience.finished.double().mean().item(),
        "rollout/count": float(len(experience)),
        "policy/entropy": -masked_mean(experience.logprobs, mask).item(),
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
    """(B,) scores after weighting, normalising, clipping and the rule for replies that never end, in this order."""
    scores = config.weight * experience.scores.to(experience.values.dtype)
    if config.normalize == "running":
        running.moments = running.moments.merge(Moments.of(scores, scores.isfinite()))
        scores = normalize_scores(scores, running.moments)
    scores = clip_scores(scores, config.clip)
    return apply_missing_eos(scores, experience.finished, config.missing_eos, config.missing_eos_value)


def sequence_kl(experience: Experience) -> float:
    """Mean over replies of `reply_kl`."""
    return reply_kl(experience).mean().item()


def reply_kl(experience: Experience) -> Tensor:
    """(B,) the k1 estimate of KL(actor || reference) summed over a reply, in nats."""
    assert experience.reference_logprobs is not None
    return zero_outside(k1(experience.logprobs, experience.reference_logprobs), experience.mask).sum(1)
