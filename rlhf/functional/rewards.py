"""From the score of a response to the reward of each of its tokens.

Order of use: `combine_scores`, `normalize_scores`, `clip_scores`, `penalize_length`, `apply_missing_eos`, `token_rewards`.
Left out on purpose: scoring itself, and any bootstrap value for an answer cut off at the length limit (`advantages.gae`).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from rlhf.errors import CheckFailed
from rlhf.functional.kl import ESTIMATORS
from rlhf.functional.masked import Moments, last_index, zero_outside


def combine_scores(
    scores: Float[Tensor, "C B"],
    weights: Float[Tensor, " C"],
    rule: Literal["sum", "mean", "min", "mean_minus_std"],
    std_coef: float = 1.0,
) -> Float[Tensor, " B"]:
    """One score a reply out of those of C sources, each times its weight.

    `min` and `mean_minus_std` (mean - std_coef * std, biased) are the worst-case and the uncertainty-weighted optimisation of
    an ensemble of reward models (Coste et al. 2023, arXiv:2310.02743, who take off the variance); of one member, all are it.
    """
    weighted = weights.unsqueeze(1) * scores
    match rule:
        case "sum":
            return weighted.sum(0)
        case "mean":
            return weighted.mean(0)
        case "min":
            return weighted.amin(0)
        case "mean_minus_std":
            return weighted.mean(0) - std_coef * weighted.std(0, correction=0)


def disagreement(scores: Float[Tensor, "C B"], weights: Float[Tensor, " C"]) -> Float[Tensor, " B"]:
    """Biased standard deviation of the weighted scores of a reply over the C members of an ensemble."""
    return (weights.unsqueeze(1) * scores).std(0, correction=0)


def token_rewards(
    scores: Float[Tensor, " B"],
    logprobs: Float[Tensor, "B T"],
    reference_logprobs: Float[Tensor, "B T"] | None,
    mask: Shaped[Tensor, "B T"],
    coef: float,
    estimator: str = "k1",
    place: Literal["tokens", "score"] = "tokens",
) -> Float[Tensor, "B T"]:
    """-coef times the KL estimate on every response token, plus the score on the last one; 0 outside the mask.

    With place `score` the penalties of all tokens stand where the score does, as in TRL's RLOO (Ahmadian et al. 2024,
    arXiv:2402.14740): no token is blamed for its own part.

    The last response token is EOS when there is one, as in verl and OpenRLHF. TRL and the N+ code put the score one
    position later, which multiplies every advantage by one more lambda. An empty response gets no reward at all.
    Without a KL term (coef 0) there need be no reference, and the rewards are the scores.

    Raises ValueError for a coefficient without a reference.
    """
    if reference_logprobs is None:
        if coef != 0:
            raise ValueError(f"a KL coefficient of {coef} needs reference_logprobs, got None")
        penalties = torch.zeros_like(logprobs)
    else:
        penalties = zero_outside(-coef * ESTIMATORS[estimator](logprobs, reference_logprobs), mask)
    if place == "score":
        scores, penalties = scores + penalties.sum(-1), torch.zeros_like(penalties)
    indices = torch.arange(mask.shape[-1], device=mask.device)
    is_last = (indices == last_index(mask).unsqueeze(-1)) & mask.bool()
    return torch.where(is_last, penalties + scores.unsqueeze(-1), penalties)


def apply_missing_eos(
    scores: Float[Tensor, " B"],
    has_eos: Bool[Tensor, " B"],
    rule: Literal["replace", "subtract", "none"],
    value: float,
) -> Float[Tensor, " B"]:
    """Scores after the rule for responses that never ended; those that did keep theirs.

    `replace` puts `value` in place of the score (the N+ code, with -1), `subtract` takes it off the score (TRL, with
    a positive penalty), `none` leaves it.
    """
    of_unfinished = {"replace": torch.full_like(scores, value), "subtract": scores - value, "none": scores}
    return torch.where(has_eos, scores, of_unfinished[rule])


def penalize_length(
    scores: Float[Tensor, " B"], lengths: Shaped[Tensor, " B"], penalty: float, budget: int
) -> Float[Tensor, " B"]:
    """Scores less `penalty` for each token of a reply beyond `budget`.

    With a budget of L_max - L_cache and a penalty of 1 / L_cache this is the soft overlong punishment of DAPO
    (arXiv:2503.14476, eq. 13), as no reply is longer than L_max.
    """
    return scores - penalty * (lengths - budget).clamp(min=0)


def clip_scores(scores: Float[Tensor, " B"], limit: float | None) -> Float[Tensor, " B"]:
    """Scores cut to -limit..limit; None leaves them."""
    return scores if limit is None else scores.clamp(-limit, limit)


def normalize_scores(
    scores: Float[Tensor, " B"], moments: Moments, shift: bool = True, eps: float = 1e-8
) -> Float[Tensor, " B"]:
    """(score - mean) / std by the running moments of all scores so far; without `shift` only divided.

    A variance up to `eps` says nothing about the scale (one score, or all equal): scores are then not divided.
    """
    std = moments.std if moments.variance > eps else 1.0
    return (scores - (moments.mean if shift else 0.0)) / std


def gain_bias(scores: Float[Tensor, " B"], target_mean: float = 0.0, target_std: float = 1.0) -> tuple[float, float]:
    """Gain and bias such that gain * scores + bias has the target mean and (biased) standard deviation.

    Ziegler et al. 2019 (arXiv:1909.08593) normalise a reward model so on answers of the reference policy.

    Raises CheckFailed if all scores are equal, or one is not finite.
    """
    if not scores.isfinite().all():
        raise CheckFailed(f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are not finite: they have no mean")
    if scores.amin() == scores.amax():
        raise CheckFailed(
            f"all {scores.numel()} scores are {scores[0].item():g}, so no gain can give them a standard deviation of "
            f"{target_std:g}; expected a trained reward model and different answers"
        )
    moments = Moments.of(scores)
    gain = target_std / moments.std
    return gain, target_mean - gain * moments.mean
