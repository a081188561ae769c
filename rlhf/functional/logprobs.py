"""Log-probability of tokens and entropy, from logits.

Logits are divided by the sampling temperature here and nowhere else, so that rollout, reference and update all speak of
the distribution that was sampled from. Left out on purpose: top-k and top-p, which would give a token probability zero
under one policy and not under the other.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits over temperature in float32 or wider: bfloat16 has 8 significant bits, too few for a ratio near 1."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def token_logprobs(
    logits: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"], temperature: float = 1.0
) -> Float[Tensor, "B T"]:
    """log softmax(logits / temperature) at each token; the logits at t are those that predict the token at t.

    The result is float32, or float64 for float64 logits. The temperature must be above 0.
    """

    def one_row(logits: Tensor, tokens: Tensor) -> Tensor:
        scaled = _scaled(logits, temperature)
        chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return chosen - scaled.logsumexp(dim=-1)

    # Row by row, since the temporaries are as large as the logits: with V = 150 000 they decide the peak of memory.
    return torch.stack([one_row(*row) for row in zip(logits, tokens, strict=True)])


def entropy(logits: Float[Tensor, "B T V"], temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """Entropy in nats of softmax(logits / temperature) at each position, for finite logits."""

    def one_row(logits: Tensor) -> Tensor:
        scaled = _scaled(logits, temperature)
        return scaled.logsumexp(dim=-1) - (scaled.softmax(dim=-1) * scaled).sum(dim=-1)

    return torch.stack([one_row(row) for row in logits])
