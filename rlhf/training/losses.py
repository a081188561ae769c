"""The actor's loss in every policy stage: clipped, and beside it the KL and the entropy where they are in the loss."""

from __future__ import annotations

from torch import Tensor

from rlhf.config.policies import Kl, PolicyUpdate
from rlhf.functional.importance import importance_weights
from rlhf.functional.kl import ESTIMATORS
from rlhf.functional.masked import zero_outside
from rlhf.functional.ppo import policy_loss
from rlhf.models.actor_critic import Output
from rlhf.report.stats import Stats
from rlhf.rollout.experience import Experience


def actor_loss(output: Output, part: Experience, update: PolicyUpdate, kl: Kl, kl_coef: float, stats: Stats) -> Tensor:
    """Loss of a micro-batch by the weights of its tokens; statistics of it go into `stats`.

    Args:
        output: of the policy on `part.batch()`, with the entropy where `update.entropy_coef` is not 0.
        kl_coef: as the controller has it now.
    """
    assert part.advantages is not None
    assert part.weights is not None
    assert output.logprobs is not None
    logprobs, mask, weights = part.spread(output.logprobs), part.learned, part.weights
    importance, told = 1.0, {}
    if update.importance_cap:
        importance, told = importance_weights(part.logprobs, part.sampled_logprobs, mask, update.importance_cap)
    loss, of_loss = policy_loss(
        logprobs,
        part.logprobs,
        part.advantages,
        mask,
        update.clip,
        weights=weights * importance,
        clip_high=update.clip_high,
        dual_clip=update.dual_clip,
        ratio_of=update.ratio_of,
    )
    stats.add_all({f"policy/{name}": value for name, value in (of_loss | told).items()}, mask.sum())
    stats.add("policy/loss", loss.detach(), weights.sum())
    if kl.place == "loss" and part.reference_logprobs is not None:
        apart = zero_outside(ESTIMATORS[kl.estimator](logprobs, part.reference_logprobs), mask)
        loss = loss + kl_coef * (weights * apart).sum()
        stats.add("kl/loss", (weights * apart).sum().detach(), weights.sum())
    if output.entropy is not None:
        spread = zero_outside(part.spread(output.entropy), mask)
        loss = loss - update.entropy_coef * (weights * spread).sum()
        stats.add("policy/full_entropy", spread.sum().detach(), mask.sum())
    return loss
