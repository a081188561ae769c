"""From scores to advantages: which token gets how much of the praise or the blame.

Works on the experience of all ranks at once (it is small), so that normalising and whitening are global by construction.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.config.policies import Kl
from rlhf.config.rewards import Reward
from rlhf.config.schema import GrpoConfig, PpoConfig
from rlhf.functional.advantages import BASELINES, deviation, gae, same_scores
from rlhf.functional.kl import k1
from rlhf.functional.masked import Moments, masked_mean, whiten, zero_outside
from rlhf.functional.ppo import explained_variance
from rlhf.functional.preference import correlation
from rlhf.functional.rewards import (
    apply_missing_eos,
    clip_scores,
    disagreement,
    normalize_scores,
    penalize_length,
    token_rewards,
)
from rlhf.rollout.experience import Experience
from rlhf.rollout.ngrams import distinct, repeated
from rlhf.rollout.scoring import Scored


class RunningScores:
    """Moments of every finite score seen so far; part of a training checkpoint."""

    def __init__(self) -> None:
        self.moments = Moments.empty()

    def see(self, scores: Tensor, kept: Tensor) -> None:
        self.moments = self.moments.merge(Moments.of(scores, scores.isfinite() & kept))

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
    mask, values = experience.learned, experience.values
    assert values is not None
    scores = shaped_scores(experience, config.reward, running)
    rewards = rewards_of(experience, scores, config.kl, kl_coef)
    advantages, returns = gae(rewards, values, mask, config.ppo.gamma, config.ppo.lam)
    stats = described(experience, scores, config.reward, kl_coef) | {
        "value/mean": masked_mean(values, mask).item(),
        "value/explained_variance": float(explained_variance(values, returns, mask)),
        "advantage/mean": masked_mean(advantages, mask).item(),
    }
    if config.ppo.whiten:
        advantages = whiten(advantages, mask, Moments.of(advantages, mask))
    return replace(experience, rewards=rewards, advantages=advantages, returns=returns), stats


def credit_without_critic(
    experience: Experience,
    config: GrpoConfig,
    kl_coef: float,
    running: RunningScores,
    greedy: Scored | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Adds rewards, and advantages by comparison with other replies; replies to one prompt stand side by side.

    Args:
        greedy: the greedy reply to each prompt: ReMax compares with what it scores. Nothing is learned of a prompt where it has
            no score.
    """
    if greedy is not None:
        compared_with = greedy.scores.kept.repeat_interleave(config.rollout.samples_per_prompt)
        experience = replace(experience, kept=experience.scored & compared_with)
    mask, grpo, groups = experience.learned, config.grpo, (-1, config.rollout.samples_per_prompt)
    kept, scores = experience.scored.view(groups), shaped_scores(experience, config.reward, running)
    rewards = rewards_of(experience, scores, config.kl, kl_coef)
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    whole = (to_go[:, 0] if config.kl.place == "score" else scores).view(groups)
    if greedy is None:
        compared = whole - BASELINES[grpo.estimator](whole, kept)
    else:
        compared = whole - shaped_before(greedy, config.reward, running).to(whole)[:, None]
    if grpo.estimator == "grpo" and grpo.scale != "none":
        compared = compared / deviation(whole, kept, grpo.scale)
    # A penalty on a token is its own, and that of the tokens before: it is compared with nothing, and not scaled.
    of_tokens = to_go - whole.flatten()[:, None]
    advantages = zero_outside(compared.flatten()[:, None] + of_tokens, mask)
    if grpo.estimator.startswith("reinforce++"):
        advantages = whiten(advantages, mask, Moments.of(advantages, mask))
    stats = described(experience, scores, config.reward, kl_coef)
    stats["advantage/mean"] = masked_mean(advantages, mask).item()
    if config.rollout.samples_per_prompt > 1:
        stats["reward/same_scores"] = same_scores(scores.view(groups), kept).double().mean().item()
    return replace(experience, rewards=rewards, advantages=advantages), stats


def shaped_before(scored: Scored, config: Reward, running: RunningScores) -> Tensor:
    """(B,) as `shaped_scores`, but not counted among those that normalising goes by: what a choice among replies looks at."""
    scores, samples = zero_outside(scored.scores.scores, scored.scores.kept), scored.samples
    lengths = torch.tensor([len(response) for response in samples.responses])
    return _shaped(config.weight * scores, lengths, torch.tensor(samples.finished), config, running)


def groups_that_teach(scored: Scored, size: int, config: Reward, running: RunningScores) -> Tensor:
    """(G,) whether replies to the same prompt, `size` of them, do not all score the same."""
    return ~same_scores(shaped_before(scored, config, running).view(-1, size), scored.scores.kept.view(-1, size))


def described(experience: Experience, scores: Tensor, config: Reward, kl_coef: float) -> dict[str, float]:
    """Means over all replies, whatever the estimator."""
    mask, replies = experience.mask, experience.replies
    stats = {
        **score_stats(experience, config),
        "reward/shaped": masked_mean(scores, experience.scored).item(),
        "rollout/length": mask.sum(1).double().mean().item(),
        "rollout/ended": experience.finished.double().mean().item(),
        "rollout/count": float(len(experience)),
        "rollout/repeated": sum(map(repeated, replies)) / len(replies),
        "rollout/distinct": distinct(replies),
        "policy/entropy": -masked_mean(experience.logprobs, mask).item(),
        "kl/coef": kl_coef,
    }
    return stats | ({} if experience.reference_logprobs is None else {"kl/sequence": sequence_kl(experience)})


def rewards_of(experience: Experience, scores: Tensor, kl: Kl, coef: float) -> Tensor:
    """(B, T): the score on the last token of each reply, and the KL penalty where it is a part of the reward."""
    reference = experience.reference_logprobs
    if kl.place == "loss":
        return token_rewards(scores, experience.logprobs, None, experience.learned, 0.0)
    return token_rewards(scores, experience.logprobs, reference, experience.learned, coef, kl.estimator, kl.place)


def shaped_scores(experience: Experience, config: Reward, running: RunningScores) -> Tensor:
    """(B,) scores after weighting, normalising, clipping, the penalty on length and the rule for replies that never end, in
    this order; of a reply without one, a number that no formula after it looks at."""
    scored = experience.scored
    scores = config.weight * zero_outside(experience.scores.to(experience.logprobs.dtype), scored)
    if config.normalize == "running":
        running.see(scores, scored)
    return _shaped(scores, experience.mask.sum(1), experience.finished, config, running)


def _shaped(scores: Tensor, lengths: Tensor, finished: Tensor, config: Reward, running: RunningScores) -> Tensor:
    if config.normalize == "running":
        scores = normalize_scores(scores, running.moments)
    scores = clip_scores(scores, config.clip)
    if config.length_penalty:
        scores = penalize_length(scores, lengths, config.length_penalty, config.length_budget)
    return apply_missing_eos(scores, finished, config.missing_eos, config.missing_eos_value)


def score_stats(experience: Experience, config: Reward) -> dict[str, float]:
    """Mean and deviation of the scores, and of those of each of several sources, over the replies that have them."""
    of_each = {name: scores[~scores.isnan()] for name, scores in experience.components.items()}
    stats = {"reward/masked": float((~experience.scored).sum())}
    for name, scores in {"score": experience.scores[experience.scored], **of_each}.items():
        if len(scores):
            stats |= {f"reward/{name}": scores.mean().item(), f"reward/{name}_std": scores.std(unbiased=False).item()}
    if experience.scored.any():
        scores, lengths = experience.scores[experience.scored].double(), experience.mask.sum(1)[experience.scored].double()
        stats["reward/length_correlation"] = correlation(scores, lengths).item()
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
