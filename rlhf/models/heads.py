"""The scalar head: one number per position, read at the last token by a reward model and before every token by a critic."""

from __future__ import annotations

import math

import torch
from torch import nn

from rlhf.errors import DataError

HEAD = "score"
"""Name of the scalar head in every decoder-only `...ForSequenceClassification` of transformers."""


def initialise_head(model: nn.Module, seed: int) -> None:
    """Draws the head's weights from N(0, 1/sqrt(d+1)), d its input width; a bias, where there is one, starts at 0.

    Source: openai/lm-human-preferences (Ziegler et al. 2019), lm_human_preferences/language/model.py, as described in Huang et
    al. 2023, "The N implementation details of RLHF with PPO". Stiennon et al. 2020 print 1/(d+1), which is 64 times too small
    at d = 4096 and not what the code does.
    """
    head = scalar_head(model)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator, dtype=torch.float32) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


def zero_head(model: nn.Module) -> None:
    """Sets the head to zero, so that values start at exactly 0."""
    head = scalar_head(model)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()


def scalar_head(model: nn.Module) -> nn.Linear:
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise DataError(f"{type(model).__name__} has no scalar head `{HEAD}` (a linear layer with one output)")
    return head
