"""Log-probability of tokens and entropy, from logits.

Logits are divided by the sampling temperature here and nowhere else, so that rollout, reference and update all speak of
the distribution that was sampled from. Left out on purpose: top-k and top-p, which would give a token probability zero
under one policy and not under the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature in float32 or wider: bfloat16 has 8 significant bits, too few for a ratio near 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Float[Tensor, "*P V"], tokens: Int[Tensor, "*P"], temperature: float = 1.0) -> Float[Tensor, "*P"]:
    """log softmax(logits / temperature) at each token; the logits are those that predict it.

    The result is float32, or float64 for float64 logits. The temperature must be above 0.
    """
    return _TokenLogprobs.apply(logits, tokens, temperature)  # pyright: ignore[reportReturnType]


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the logits and one number a place; autograd would keep, and write, several tensors as large as the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        scaled = _scaled(logits, temperature)
        total = scaled.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, tokens, total)
        ctx.temperature = temperature
        return (scaled.gather(-1, tokens[..., None]) - total).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """d log p / d logits = (1 at the token - p) / temperature."""
        logits, tokens, total = ctx.saved_tensors
        gradient = upstream[0][..., None] / ctx.temperature
        found = (_scaled(logits, ctx.temperature) - total).exp_().mul_(-gradient)
        return found.scatter_add_(-1, tokens[..., None], gradient.to(found.dtype)).to(logits.dtype), None, None


def reply_sums(logprobs: Float[Tensor, " K"], lengths: Sequence[int]) -> Float[Tensor, " B"]:
    """Sum over each reply, of log-probabilities that stand one reply after the other."""
    return torch.stack([reply.sum() for reply in logprobs.split(list(lengths))])


def entropy(logits: Float[Tensor, "*P V"], temperature: float = 1.0) -> Float[Tensor, "*P"]:
    """Entropy in nats of softmax(logits / temperature) at each place, for finite logits."""
    logprobs = _scaled(logits, temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
