"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347) and the numbers that tell how an update goes.

Losses and statistics are SUMS over the tokens of the mask (except where a name says max). What makes a mean of a loss is
in `weights`, which `masked.token_weights` takes from the whole batch over all micro-batches and processes, so that
splitting a batch does not change the update; a mean here would weigh tokens of short micro-batches more. Left out on
purpose: the weights of the value loss, the KL and the entropy beside the policy's.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rlhf.functional.masked import masked_sum, zero_outside

RatioOf = Literal["tokens", "reply", "reply_mean"]


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    clip: float,
    weights: Float[Tensor, "B T"] | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    ratio_of: RatioOf = "tokens",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Sum of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)), ratio = exp(logprobs - old_logprobs).

    Args:
        weights: of each token in the sum; None: 1 each.
        clip_high: None: as `clip`. A larger one lets unlikely tokens grow (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8).
        dual_clip: the loss of a token with A < 0 is at most -A dual_clip, however far its ratio grew; above 1 (Ye et al. 2020,
            arXiv:1912.09729, eq. 5). None: no such bound.
        ratio_of: `reply`: one ratio for all tokens of a reply, the product of theirs (RLOO, Ahmadian et al. 2024,
            arXiv:2402.14740); `reply_mean`: the geometric mean of theirs (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7).

    Statistics, detached: `approx_kl` (half the squared log ratio), `clip_fraction` (tokens with a ratio outside the
    clip range, whatever the sign of A) and `ratio` are sums; `max_abs_log_ratio` is a maximum, as a sum of signed
    differences can cancel and hide a mismatch.
    """
    low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
    # Masked before exp, not after: the gradient of exp at a masked infinity would be 0 * inf = NaN.
    log_ratio = zero_outside(logprobs - old_logprobs, mask)
    ratio = _of_reply(log_ratio, mask, ratio_of).exp()
    advantages = zero_outside(advantages, mask)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)

    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    return _weighed_sum(loss, weights, mask), {
        "approx_kl": 0.5 * log_ratio.square().sum(),
        "clip_fraction": masked_sum(((ratio < low) | (ratio > high)).to(ratio), mask),
        "ratio": masked_sum(ratio, mask),
        "max_abs_log_ratio": log_ratio.abs().max(),
    }


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    clip: float | None,
    weights: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Sum of half the larger of the squared errors of the value and of the value clipped to old value +- clip.

    `clip` is in units of the return; None turns it off. `weights` as for the policy. Statistics, detached sums:
    `clip_fraction` (tokens whose value moved by more than the clip) and `error_sq` (squared error of the value itself);
    `max_abs_change` is a maximum.
    """
    values, old_values, returns = (zero_outside(x, mask) for x in (values, old_values, returns))
    limit = torch.inf if clip is None else clip
    move = values - old_values
    error_sq = (values - returns).square()
    clipped_error_sq = (old_values + move.clamp(-limit, limit) - returns).square()
    loss = 0.5 * torch.maximum(error_sq, clipped_error_sq)
    moved = move.detach().abs()
    return _weighed_sum(loss, weights, mask), {
        "clip_fraction": (moved > limit).sum(),
        "error_sq": error_sq.detach().sum(),
        "max_abs_change": moved.max(),
    }


def explained_variance(
    values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 no better than a constant.

    0 where the returns have no variance to explain (all equal, or none).
    """
    selected = returns.detach()[mask.bool()]
    errors = selected - values.detach()[mask.bool()]
    # Compared, not computed: rounding gives equal numbers a variance that is tiny but not 0.
    if selected.numel() == 0 or selected.amin() == selected.amax():
        return torch.zeros((), dtype=returns.dtype, device=returns.device)
    return 1 - errors.var(correction=0) / selected.var(correction=0)


def _of_reply(log_ratio: Tensor, mask: Tensor, ratio_of: RatioOf) -> Tensor:
    if ratio_of == "tokens":
        return log_ratio
    total = log_ratio.sum(1, keepdim=True)
    if ratio_of == "reply_mean":
        total = total / mask.bool().sum(1, keepdim=True).clamp(min=1)
    return zero_outside(total.expand_as(log_ratio), mask)


def _weighed_sum(loss: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    return (loss if weights is None else loss * zero_outside(weights, mask)).sum()
