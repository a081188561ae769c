"""Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438).

Left out on purpose: whitening, which needs the moments of all processes (`masked.whiten`), and any bootstrap value. The
value after the last response token is 0 whether the answer ended with EOS or was cut off at the length limit: the score
was given to the answer as it stands, and nothing follows it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
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
