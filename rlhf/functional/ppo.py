"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347) and the numbers that tell how an update goes.

Losses and statistics are SUMS over the tokens of the mask (except where a name says max). The caller divides once by
the number of tokens of the whole batch over all micro-batches and processes, so that splitting a batch does not change
the update; a mean here would weigh tokens of short micro-batches more. Left out on purpose: that division, the weight
of the value loss, and entropy.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rlhf.functional.masked import masked_sum, zero_outside


def policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    clip: float,
    weights: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Sum of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio = exp(logprobs - old_logprobs).

    `weights` (importance.py) multiply each token's term.

    Statistics, detached: `approx_kl` (half the squared log ratio), `clip_fraction` (tokens with a ratio outside the
    clip range, whatever the sign of A) and `ratio` are sums; `max_abs_log_ratio` is a maximum, as a sum of signed
    differences can cancel and hide a mismatch.
    """
    # Masked before exp, not after: the gradient of exp at a masked infinity would be 0 * inf = NaN.
    log_ratio = zero_outside(logprobs - old_logprobs, mask)
    ratio = log_ratio.exp()
    advantages = zero_outside(advantages, mask)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = (losses if weights is None else zero_outside(weights, mask) * losses).sum()

    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    return loss, {
        "approx_kl": 0.5 * log_ratio.square().sum(),
        "clip_fraction": ((ratio - 1).abs() > clip).sum(),
        "ratio": masked_sum(ratio, mask),
        "max_abs_log_ratio": log_ratio.abs().max(),
    }


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    clip: float | None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Sum of half the larger of the squared errors of the value and of the value clipped to old value +- clip.

    `clip` is in units of the return; None turns it off. Statistics, detached sums: `clip_fraction` (tokens whose value
    moved by more than the clip) and `error_sq` (squared error of the value itself); `max_abs_change` is a maximum.
    """
    values, old_values, returns = (zero_outside(x, mask) for x in (values, old_values, returns))
    limit = torch.inf if clip is None else clip
    move = values - old_values
    error_sq = (values - returns).square()
    clipped_error_sq = (old_values + move.clamp(-limit, limit) - returns).square()
    loss = 0.5 * torch.maximum(error_sq, clipped_error_sq).sum()
    moved = move.detach().abs()
    return loss, {
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
