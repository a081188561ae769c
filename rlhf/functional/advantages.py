"""How much better a reply was than expected: by a critic, or by other replies to the same prompt.

With a critic: generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438). Left out on purpose: whitening,
which needs the moments of all processes (`masked.whiten`), and any bootstrap value. The value after the last response
token is 0 whether the answer ended with EOS or was cut off at the length limit: the score was given to the answer as it
stands, and nothing follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from rlhf.functional.masked import zero_outside


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages and returns of response tokens, exactly 0 outside the mask.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        R_t     = A_t + V_t

    `values` are of the state before token t. The mask is that of the response and right-padded: ones, then zeros.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    next_values = pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values

    # Pads come first in this direction and hold zeros only, so each row starts afresh at its own last token.
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values


def group_mean(scores: Float[Tensor, "G K"], kept: Bool[Tensor, "G K"]) -> Float[Tensor, "G K"]:
    """Mean score of a prompt's K replies, of those that are kept (GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2)."""
    count = kept.sum(1, keepdim=True).clamp(min=1)
    return (zero_outside(scores, kept).sum(1, keepdim=True) / count).expand_as(scores)


def leave_one_out_mean(scores: Float[Tensor, "G K"], kept: Bool[Tensor, "G K"]) -> Float[Tensor, "G K"]:
    """Mean score of the other replies that are kept: a baseline that does not depend on the reply (RLOO, Kool et al. 2019;
    Ahmadian et al. 2024, arXiv:2402.14740, eq. 3). Of a reply that has no other, its own score: it is not compared."""
    others = kept.sum(1, keepdim=True) - 1
    total = zero_outside(scores, kept).sum(1, keepdim=True)
    return torch.where(others > 0, (total - scores) / others.clamp(min=1), scores)


def no_baseline(scores: Float[Tensor, "G K"], kept: Bool[Tensor, "G K"]) -> Float[Tensor, "G K"]:
    """0: whitening over all replies takes its place (REINFORCE++, Hu 2025, arXiv:2501.03262)."""
    return torch.zeros_like(scores)


BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": group_mean,
    "rloo": leave_one_out_mean,
    "reinforce++": no_baseline,
    "reinforce++-baseline": group_mean,
}
"""What a reply's score is compared with. ReMax (Li et al. 2023, arXiv:2310.10505) is not here, as it needs more than the
scores: that of the greedy reply."""

SCALE_EPS = 1e-4
"""Added to a deviation that advantages are divided by; TRL 1.16, `grpo_trainer.py`."""


def deviation(scores: Float[Tensor, "G K"], kept: Bool[Tensor, "G K"], of: Literal["group", "batch"]) -> Float[Tensor, "G K"]:
    """Standard deviation (of a sample: divided by its count less one) of a prompt's scores or of all, plus `SCALE_EPS`."""
    shape = scores.shape
    if of == "batch":
        scores, kept = scores.flatten()[None], kept.flatten()[None]
    apart = zero_outside(scores - group_mean(scores, kept), kept)
    found = (apart.square().sum(1, keepdim=True) / (kept.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
    return (found + SCALE_EPS).expand(shape)


def same_scores(scores: Float[Tensor, "G K"], kept: Bool[Tensor, "G K"]) -> Bool[Tensor, " G"]:
    """Which prompts teach nothing, as all their replies that are kept score the same."""
    return scores.masked_fill(~kept, torch.inf).amin(1) >= scores.masked_fill(~kept, -torch.inf).amax(1)
