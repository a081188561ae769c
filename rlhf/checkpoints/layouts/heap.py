"""What a layout's reader hands on: every tensor by its writer's key, numbered over the whole model, rank by rank."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from rlhf.checkpoints.stored import Stored
from rlhf.errors import DataError

WHOLE_NUMBERS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("max_position_embeddings", "padded_vocab_size", "vocab_size", "true_vocab_size", "orig_vocab_size"),
    *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
    "expert_tensor_parallel_size",
)
NUMBERS = ("norm_epsilon", "layernorm_epsilon", "rotary_base", "rotary_percent")
LARGEST = 1 << 40


@dataclass(frozen=True)
class Heap:
    """Tensors as they were found."""

    place: str
    format: str
    tensors: dict[str, tuple[Stored, ...]]
    """Under each key, one for each tensor-parallel rank; layers and experts are numbered over the whole model."""
    args: dict[str, Any]
    version: float
    """Megatron's checkpoint_version: the order of query, key and value"""
    tensor_parallel: int
    foreign: bool
    """Whether a converter wrote it, not Megatron itself: its args are few."""
    skipped: tuple[str, ...]
    files: tuple[str, ...]


def args_of(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Megatron's `args`, where a file has them; the numbers among them are numbers.

    Raises:
        DataError: they are something else.
    """
    told = content.get("args")
    if told is None:
        return {}
    if not isinstance(told, argparse.Namespace | SimpleNamespace):
        raise DataError(f"{file}: args is a {type(told).__name__}, expected the namespace that Megatron saves")
    args = dict(vars(told))
    for name, value in args.items():
        if name in WHOLE_NUMBERS and value is not None and (type(value) is not int or not 0 <= value < LARGEST):
            raise DataError(f"{file}: args.{name} is {_short(value)}, expected a whole number")
        if name in NUMBERS and value is not None and type(value) not in (int, float):
            raise DataError(f"{file}: args.{name} is {_short(value)}, expected a number")
        if isinstance(value, Tensor):
            raise DataError(f"{file}: args.{name} is a tensor, expected a plain value")
        if name == "moe_layer_freq" and type(value) is int and value < 1:
            raise DataError(f"{file}: args.{name} is {value}, expected every how many layers there are experts")
    return args


def version_of(content: Mapping[str, Any], file: Path) -> float:
    """Megatron's `checkpoint_version`.

    Raises:
        DataError: it is no number.
    """
    version = content.get("checkpoint_version", 0)
    version = 0 if version is None else version
    if type(version) not in (int, float) or not 0 <= version < LARGEST:
        raise DataError(f"{file}: checkpoint_version is {_short(version)}, expected a number, 3.0 as a rule")
    return float(version)


def _short(value: object) -> str:
    plain = isinstance(value, str | int | float | list | tuple | dict)
    return repr(value)[:40] if plain else f"a {type(value).__name__}"
