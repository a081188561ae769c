"""How far the policy is from the reference, and how strongly that is punished.

The estimators are of KL(policy || reference) from tokens sampled by the policy (Schulman 2020,
http://joschu.net/blog/kl-approx.html). They differ as a *loss*: the expected gradient of k1 is zero, that of k2 is the
gradient of KL(policy || reference), that of k3 the gradient of KL(reference || policy). In the reward no gradient flows
through them. Left out on purpose: sums over tokens, which need a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

MAX_RELATIVE_ERROR = 0.2
"""Bound of the error the adaptive controller sees (Ziegler et al. 2019, arXiv:1909.08593, section 2.2)."""


def k1(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log ratio: unbiased; single tokens may be negative."""
    return logprobs - reference_logprobs


def k2(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half the squared log ratio: biased, never negative."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(-log ratio) - 1 + log ratio: unbiased and never negative."""
    log_ratio = logprobs - reference_logprobs
    # expm1, since exp(x) - 1 rounds to below zero for the small ratios that matter.
    return torch.expm1(-log_ratio) + log_ratio


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass
class FixedKl:
    """A KL coefficient that stays as it is."""

    coef: float

    def update(self, kl: float, samples: int) -> None:
        """Accepts what the adaptive controller needs, and ignores it."""

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


@dataclass
class AdaptiveKl:
    """A KL coefficient that moves until the KL of a response is `target` nats (Ziegler et al. 2019).

    `horizon` is the number of samples over which a full error would change the coefficient by its own size; the paper's
    code has target 6 and horizon 10 000: https://github.com/openai/lm-human-preferences, `train_policy.py`.
    """

    coef: float
    target: float
    horizon: int

    def update(self, kl: float, samples: int) -> None:
        """Move the coefficient after `samples` responses whose mean KL, summed over tokens, was `kl` nats."""
        error = min(max(kl / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coef *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


def controller(kind: Literal["fixed", "adaptive"], coef: float, target: float, horizon: int) -> FixedKl | AdaptiveKl:
    """The controller a config asks for by name."""
    return AdaptiveKl(coef, target, horizon) if kind == "adaptive" else FixedKl(coef)
