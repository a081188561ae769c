"""Learning from pairs: the loss of a reward model, how often it is right, and how sure that number is.

Left out on purpose: means. Everything is per pair, and the caller sums over micro-batches and processes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], margin: float | Float[Tensor, " B"] = 0.0
) -> Float[Tensor, " B"]:
    """-log sigmoid(chosen - rejected - margin) per pair, of two scores each.

    The model is Bradley and Terry 1952; the margin, in units of the score, is Touvron et al. 2023
    (arXiv:2307.09288, equation 2).
    """
    return -logsigmoid(chosen - rejected - margin)


def accuracy(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 for a pair in the right order, 0 in the wrong one; a tie counts one half, as a coin would decide it."""
    # Compared, not subtracted: the difference of two infinite scores is NaN.
    return torch.where(chosen == rejected, 0.5, (chosen > rejected).to(chosen.dtype))


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a success rate (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212), 95% for the default z.

    It stays inside 0..1 and has a width even at 0 or all successes. No trials say nothing: (0, 1).
    `successes` may be fractional, as ties count one half.
    """
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    spread = z**2 / trials
    centre = (rate + spread / 2) / (1 + spread)
    half_width = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
