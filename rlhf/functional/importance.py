"""Importance sampling: what a policy samples and what another is updated with may be two distributions, close but not equal.

A rollout engine with kernels, precision or weights of its own draws tokens from pi_sampled; the update holds them for draws
from pi_old. Weighing each token by pi_old / pi_sampled makes its expectation right again; truncating the weight bounds the
variance (Ionides 2008, "Truncated importance sampling"; per token as in Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"). Left out: weights of whole replies, and leaving tokens out.
"""

from __future__ import annotations

import math

from jaxtyping import Float, Shaped
from torch import Tensor

from rlhf.functional.masked import zero_outside


def importance_weights(
    logprobs: Float[Tensor, "B T"], sampled_logprobs: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], cap: float
) -> tuple[Float[Tensor, "B T"], dict[str, Tensor]]:
    """min(exp(logprobs - sampled_logprobs), cap) at each token of the mask, detached; 0 outside.

    Statistics, sums over the mask: `importance_weight`, and `importance_capped` (tokens whose weight the cap lowered).
    """
    log_weights = zero_outside((logprobs - sampled_logprobs).detach(), mask)
    capped = log_weights > math.log(cap)
    # Clamped before exp: a log weight may be too large for it.
    weights = zero_outside(log_weights.clamp(max=math.log(cap)).exp(), mask)
    return weights, {"importance_weight": weights.sum(), "importance_capped": capped.sum()}
