"""Drawing tokens, with a random stream of its own for every row.

A row's numbers follow from its seed and the token's place in the reply, through a counter-based generator. So neither the
rank that samples a row, nor the rows beside it, nor a restart, changes what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from rlhf.functional.logprobs import token_logprobs


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 filter nothing."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def uniform(seeds: Tensor, place: Tensor | int) -> Tensor:
    """(B,) numbers in [0, 1), a function of the (B,) int64 seeds and the (B,) places alone.

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): its state after `place` + 1
    steps is the seed plus so many times the golden gamma. int64 arithmetic wraps as uint64 does; only shifts need care.
    """
    z = seeds + (place + 1) * torch.tensor(_signed(0x9E3779B97F4A7C15))
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def sample(logits: Tensor, sampling: Sampling, seeds: Tensor, place: Tensor | int) -> tuple[Tensor, Tensor]:
    """(tokens (B,), log-probabilities (B,)) from logits (B, V), for the (B,) places in the replies.

    The log-probability is that of the full softmax at the sampling temperature, whatever the filters leave: it is the policy
    that is trained, and filters are not part of it.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, token_logprobs(logits, tokens)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    kept, ids = scaled, torch.empty(0, dtype=torch.long)  # the warpers' signature asks for input ids and does not look at them
    if sampling.top_k:
        kept = TopKLogitsWarper(sampling.top_k)(ids, kept)  # pyright: ignore[reportArgumentType]
    if sampling.top_p < 1:
        kept = TopPLogitsWarper(sampling.top_p)(ids, kept)  # pyright: ignore[reportArgumentType]
    total = scaled.logsumexp(-1, keepdim=True)
    cumulative = (kept - total).exp_().cumsum(-1, dtype=torch.float64)
    # right=True never lands on a token of probability 0: it finds the first place where the sum exceeds the draw.
    draw = uniform(seeds, place)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, draw, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), (scaled.gather(-1, tokens) - total).squeeze(1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
