"""How many floating-point operations a stage takes, and how long they take. Pure functions of sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from torch import nn

from rlhf.models.actor_critic import unwrapped

EXPERTS = ".experts."


@dataclass(frozen=True)
class Passed:
    """What a token passes on its way through a model, in weights of matrix products."""

    trunk: float
    head: float
    """LM head; a scalar head is nothing beside the rest."""
    backward: float
    """Times the forward that a backward pass takes: 2 where all weights are trained (gradients of them and of activations), 1
    beneath adapters (of activations alone), less where layers at the bottom are frozen."""
    recomputed: bool = False

    def forward(self, tokens: float, read: float) -> float:
        """FLOP: 2 for each weight and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). Attention's own products, a
        share of about tokens / (6 * hidden) of these, are left out."""
        return 2 * (self.trunk * tokens + self.head * read)

    def training(self, tokens: float, read: float) -> float:
        """FLOP of forward and backward: with all weights trained 6 for each weight and token, and 2 more of the trunk's where
        activations are computed again."""
        again = 2 * self.trunk * tokens if self.recomputed else 0.0
        return self.forward(tokens, read) * (1 + self.backward) + again


def passed(model: nn.Module, recomputed: bool = False, frozen_layers: int = 0) -> Passed:
    """Of a model of one role. Of experts a token passes as many as its config says."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    looked_up = {id(m.weight) for m in inner.modules() if isinstance(m, nn.Embedding)}
    output = inner.get_output_embeddings()
    head = output.weight.numel() if isinstance(output, nn.Linear) else 0  # pyright: ignore[reportAttributeAccessIssue]
    skipped = looked_up | ({id(output.weight)} if head else set())  # pyright: ignore
    trunk = sum(
        p.numel() * (active if EXPERTS in f".{name}" else 1.0)
        for name, p in model.named_parameters()
        if p.ndim >= 2 and id(p) not in skipped
    )
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up]
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    whole = 2 * trained > sum(p.numel() for p in matrices)
    part = 1 - frozen_layers / config.num_hidden_layers
    return Passed(trunk, head, (2.0 if whole or frozen_layers else 1.0) * part, recomputed)


def decoding_seconds(
    flop: float, weight_bytes: float, rows: int, replies: int, reply: int, speed: float, bandwidth: float | None, least: float
) -> float:
    """Of sampling `replies` replies of `reply` tokens in one process, `rows` at a time: the step of a token computes, and reads
    all weights once whatever the rows; the slower of the two counts, and at least the time that starting its kernels takes.

    Args:
        flop: of one token of one row.
        speed: FLOP/s that are reached.
        least: seconds of a step.
    """
    steps = ceil(replies / rows) * reply
    computing = min(rows, replies) * flop / speed
    return steps * max(computing, weight_bytes / bandwidth if bandwidth else 0.0, least)
