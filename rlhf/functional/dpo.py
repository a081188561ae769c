"""Learning from preferences without a reward model: the losses of DPO and of those that came after it.

Each loss takes one score a reply: log pi - log pi_ref, or log pi alone where it has no reference; DPO and KTO sum it over the
reply's tokens, the others average. Left out on purpose: means. Everything is per pair or per reply, and the caller sums over
micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairLoss(NamedTuple):
    """A loss of the scores of chosen and rejected replies; its other parameters are the options it has in a config."""

    loss: Callable[..., Tensor]
    averaged: bool
    """Scores are averaged over the reply's tokens; otherwise summed."""


def dpo_loss(
    chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " B"]:
    """-(1 - e) log sigmoid(beta (chosen - rejected)) - e log sigmoid(beta (rejected - chosen)), of log-ratios.

    Rafailov et al. 2023 (arXiv:2305.18290, equation 7). With e, the part of labels that is taken to be wrong, it is the
    conservative DPO of Mitchell 2023 ("A note on DPO with noisy preferences", equation 3).
    """
    difference = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)


def ipo_loss(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: float) -> Float[Tensor, " B"]:
    """(chosen - rejected - 1 / (2 beta))^2, of log-ratios averaged over tokens; beta is the paper's tau.

    Azar et al. 2023 (arXiv:2310.12036, equation 17). The average is not in the paper; TRL asked its authors, whose results
    were made with it: summed, the distance that is aimed at would be a longer reply's as well as a shorter one's.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: float, gamma: float) -> Float[Tensor, " B"]:
    """-log sigmoid(beta (chosen - rejected) - gamma), of log-probabilities averaged over tokens.

    Meng et al. 2024 (arXiv:2405.14734, equation 6).
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], odds_weight: float) -> Float[Tensor, " B"]:
    """-chosen - odds_weight log sigmoid(log odds(chosen) - log odds(rejected)), of log-probabilities averaged over tokens.

    Hong et al. 2024 (arXiv:2403.07691, equations 6 and 7, with P of equation 1); odds(P) = P / (1 - P).
    """
    return -chosen - odds_weight * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def kto_loss(
    replies: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    baseline: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """weight * (1 - sigmoid(+-beta (reply - baseline))), + for a desirable reply, of log-ratios.

    Ethayarajh et al. 2024 (arXiv:2402.01306, section 4.1); `baseline` is its z_0, in nats, which has no gradient.
    """
    sign, weight = torch.where(desirable, 1.0, -1.0), torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-sign * beta * (replies - baseline))


def _log_odds(logprob: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    # Below 1 by a rounding at least: a reply that is certain has odds without end, and a gradient that is not a number.
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - torch.log(-torch.expm1(logprob))


PAIR_LOSSES: dict[str, PairLoss] = {
    "dpo": PairLoss(dpo_loss, averaged=False),
    "ipo": PairLoss(ipo_loss, averaged=True),
    "simpo": PairLoss(simpo_loss, averaged=True),
    "orpo": PairLoss(orpo_loss, averaged=True),
}
