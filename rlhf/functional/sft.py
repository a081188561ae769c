"""The loss of supervised fine-tuning.

Left out on purpose: the mean. The loss is a sum, and the caller divides once by the count of trained tokens over all
micro-batches and processes, so that neither of them changes the update.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def sft_loss(logprobs: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Sum of -log p over the trained tokens."""
    return -logprobs.sum()
