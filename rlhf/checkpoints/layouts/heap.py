"""What a layout's reader hands on: every tensor by its writer's key, numbered over the whole model, rank by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.checkpoints.stored import Stored


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
