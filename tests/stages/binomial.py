"""The binomial distribution by its definition, which resampling of zeros and ones has."""

from __future__ import annotations

import math


def binomial_quantile(count: int, probability: float, tail: float) -> int:
    """Smallest k with P(X <= k) >= tail."""
    below = 0.0
    for k in range(count + 1):
        below += math.comb(count, k) * probability**k * (1 - probability) ** (count - k)
        if below >= tail:
            return k
    return count
