"""Reading padded batches: positions, sums and means over real tokens, moments and whitening.

Left out on purpose: any exchange between processes. `Moments` of each process are merged by the caller, and `whiten`
takes the merged ones, because statistics of one process alone would make the update depend on the world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Aggregation = Literal["tokens", "replies", "constant"]


def last_index(mask: Shaped[Tensor, "B L"]) -> Int[Tensor, " B"]:
    """Index of the last real token of each row, wherever the pads are; 0 for a row without one."""
    indices = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask.bool(), indices, 0).amax(dim=-1)


def zero_outside(x: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` with exact zeros outside the mask."""
    # A product with the mask would keep NaN and infinity alive, since 0 * inf is NaN.
    return torch.where(mask.bool(), x, 0.0)


def masked_sum(x: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum over the mask; 0 if the mask is empty."""
    return zero_outside(x, mask).sum()


def masked_mean(x: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over the mask; 0 if the mask is empty."""
    return masked_sum(x, mask) / mask.bool().sum().clamp(min=1)


def token_weights(
    mask: Shaped[Tensor, "B T"], aggregation: Aggregation, longest: int, dtype: torch.dtype
) -> Float[Tensor, "B T"]:
    """What each token weighs in the mean over a batch; 0 outside the mask.

    tokens: all alike (DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.3), so long replies weigh more than short ones.
    replies: a mean over each reply, then over replies (GRPO, Shao et al. 2024, arXiv:2402.03300, eq. 3).
    constant: a sum over each reply divided by `longest` tokens, then a mean over replies: a token's weight does not depend on
    how long replies are (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
    Replies without a token count for nothing. The first two sum to 1.
    """
    inside = mask.bool().to(dtype)
    lengths = inside.sum(1, keepdim=True)
    replies = (lengths > 0).sum().clamp(min=1)
    if aggregation == "tokens":
        return inside / lengths.sum().clamp(min=1)
    return inside / ((lengths.clamp(min=1) if aggregation == "replies" else longest) * replies)


WHITENING_EPS = 1e-8
"""Added to the variance; lm-human-preferences (2019), `core.py`, `whiten`."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean of some numbers, in double precision.

    Moments of parts merge into the moments of the whole, in any order: over processes, over steps, over a resume.
    """

    count: float
    mean: float
    m2: float

    @classmethod
    def empty(cls) -> Moments:
        """The moments of no numbers; merging them changes nothing."""
        return cls(count=0.0, mean=0.0, m2=0.0)

    @classmethod
    def of(cls, x: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"] | None = None) -> Moments:
        """Moments of the numbers of `x`, or of those inside the mask."""
        selected = x.detach() if mask is None else x.detach()[mask.bool()]
        if selected.numel() == 0:
            return cls.empty()
        # Float64 on the host: some devices have no float64, and three numbers are fetched from there anyway.
        numbers = selected.to(device="cpu", dtype=torch.float64)
        mean = numbers.mean()
        return cls(count=float(numbers.numel()), mean=mean.item(), m2=(numbers - mean).square().sum().item())

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of numbers together (Chan, Golub and LeVeque 1979, the parallel form of Welford's)."""
        if self.count == 0:
            return other
        if other.count == 0:
            return self
        count = self.count + other.count
        difference = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + difference * other.count / count,
            m2=self.m2 + other.m2 + difference**2 * self.count * other.count / count,
        )

    @property
    def variance(self) -> float:
        """Biased variance (divided by the count); 0 for no numbers."""
        return self.m2 / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Square root of the biased variance."""
        return math.sqrt(self.variance)


def whiten(
    x: Float[Tensor, "B T"],
    mask: Shaped[Tensor, "B T"],
    moments: Moments,
    shift_mean: bool = True,
    eps: float = WHITENING_EPS,
) -> Float[Tensor, "B T"]:
    """Scale `x` to variance 1 by the biased variance and shift its mean to 0, or keep the mean; 0 outside the mask.

    `moments` are those of the whole batch over all processes. The biased variance and eps 1e-8 are what
    lm-human-preferences (2019) does: https://github.com/openai/lm-human-preferences, `core.py`, `whiten`.
    """
    whitened = (x - moments.mean) / math.sqrt(moments.variance + eps)
    if not shift_mean:
        whitened = whitened + moments.mean
    return zero_outside(whitened, mask)
