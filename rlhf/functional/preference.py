"""Learning from pairs: the loss of a reward model, how often it is right, how sure that number is, and how far its word counts.

Left out on purpose: means. Everything is per pair, and the caller sums over micro-batches and processes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    margin: float | Float[Tensor, " B"] = 0.0,
    target: float | Float[Tensor, " B"] = 1.0,
) -> Float[Tensor, " B"]:
    """Cross-entropy of `target`, the probability that `chosen` is the better one, and sigmoid(chosen - rejected - margin).

    With target 1 it is -log sigmoid(chosen - rejected - margin). The model is Bradley and Terry 1952; the margin, in units of
    the score, is Touvron et al. 2023 (arXiv:2307.09288, equation 2). A tie has target 0.5: it is least where both score alike.
    """
    difference = chosen - rejected - margin
    return (1 - target) * difference - logsigmoid(difference)  # as log sigmoid(-x) = log sigmoid(x) - x


def smoothed(target: Float[Tensor, " B"], flipped: float) -> Float[Tensor, " B"]:
    """The probability that the first is better, where a part `flipped` of the labels is wrong; a tie stays one.

    Label smoothing of Szegedy et al. 2016 (arXiv:1512.00567) on two classes, as in conservative DPO (Mitchell 2023).
    """
    return target * (1 - flipped) + (1 - target) * flipped


def center_penalty(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """(chosen + rejected)^2 per pair, which draws scores to a mean of 0 (Eisenstein et al. 2023, arXiv:2312.09244)."""
    return (chosen + rejected).square()


def accuracy(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 for a pair in the right order, 0 in the wrong one; a tie counts one half, as a coin would decide it."""
    # Compared, not subtracted: the difference of two infinite scores is NaN.
    return torch.where(chosen == rejected, 0.5, (chosen > rejected).to(chosen.dtype))


def wilson_interval(successes: float, trials: int | float, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a success rate (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212), 95% for the default z.

    It stays inside 0..1 and has a width even at 0 or all successes. No trials say nothing: (0, 1).
    `successes` may be fractional, as ties count one half; so may `trials`, where a prompt counts in part.
    """
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    spread = z**2 / trials
    centre = (rate + spread / 2) / (1 + spread)
    half_width = math.sqrt(spread * (rate * (1 - rate) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def reliability(difference: Float[Tensor, " P"], weight: Float[Tensor, " P"], bins: int = 10) -> Float[Tensor, "bins 3"]:
    """What sigmoid(difference) of chosen and rejected scores says, beside what is so: (weight, predicted, observed) by bin.

    The model picks the higher score and says it is right with probability sigmoid(|difference|), 0.5 to 1, which `bins` of
    equal width divide. `predicted` is the mean of that in a bin, `observed` the part that is right; 0 in an empty bin.
    """
    confidence = difference.abs().sigmoid()
    right = accuracy(difference, torch.zeros_like(difference))
    which = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(bins, 3, dtype=difference.dtype, device=difference.device)
    sums = sums.index_add(0, which, torch.stack([weight, weight * confidence, weight * right], dim=-1))
    total = sums[:, :1]
    return torch.cat([total, torch.where(total > 0, sums[:, 1:] / total, 0.0)], dim=-1)


def calibration_error(table: Float[Tensor, "bins 3"]) -> Float[Tensor, ""]:
    """Mean |predicted - observed| over the bins of `reliability`, by weight (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    weight, predicted, observed = table.unbind(dim=-1)
    return (weight * (predicted - observed).abs()).sum() / weight.sum()


def correlation(x: Float[Tensor, " B"], y: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Pearson's; 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(scale == 0, 0.0, (x * y).sum() / scale)
