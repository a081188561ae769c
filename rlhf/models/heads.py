"""The scalar head: one number per position, read at the last token by a reward model and before every token by a critic."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.errors import DataError

HEAD = "score"
"""Name of the scalar head in every decoder-only `...ForSequenceClassification` of transformers."""

BIAS = "reward_bias"
"""Field of a model's config.json: what is added to its head's output. transformers' heads have no place for it and pass it
over; a tensor that it does not know would stop other loaders. An adapter's is a tensor beside its head's weight."""


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
    if hasattr(head, "modules_to_save"):  # PEFT's: the trained copy, by the name of its only adapter
        head = head.modules_to_save["default"]  # pyright: ignore
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise DataError(f"{type(model).__name__} has no scalar head `{HEAD}` (a linear layer with one output)")
    return head


def rescale_head(model: PreTrainedModel, gain: float, bias: float) -> None:
    """From now on the model's scores are gain * score + bias (Ziegler et al. 2019, arXiv:1909.08593)."""
    head = scalar_head(model)
    if head.bias is None:
        add_bias(model)
    with torch.no_grad():
        head.weight.mul_(gain)
        head.bias.mul_(gain).add_(bias)


def add_bias(model: PreTrainedModel, bias: float = 0.0) -> None:
    head = scalar_head(model)
    head.bias = nn.Parameter(torch.full((1,), bias, dtype=head.weight.dtype, device=head.weight.device))
    setattr(model.config, BIAS, bias)


def bias_from_config(model: PreTrainedModel) -> None:
    """Gives the head the bias of its file's config, if there is one and it is not there already."""
    if scalar_head(model).bias is None and hasattr(model.config, BIAS):
        add_bias(model, getattr(model.config, BIAS))


def bias_into_config(model: PreTrainedModel) -> None:
    """Before a model is saved: a head that has got a bias here is again as its class has it."""
    if hasattr(model.config, BIAS):
        head = scalar_head(model)
        setattr(model.config, BIAS, head.bias.item())
        head.register_parameter("bias", None)
