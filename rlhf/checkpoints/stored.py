"""Tensors that can be read: known by shape and type, put together only when asked for.

A conversion is planned on these alone. Each knows where its bytes come from and what is done to them, so that a plan can be
printed before anything is read; its shape follows from running the same function on tensors without data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.operations import Heads
from rlhf.errors import DataError

DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""What files of weights hold."""


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    origins: tuple[str, ...]
    """`file: key` of every tensor of the source that goes into it."""
    how: tuple[str, ...] = ()
    """What is done to them, in order."""
    ranks: tuple[Stored, ...] = ()
    """The same before its tensor-parallel ranks were joined, as the tool that wrote it keeps it; empty where it has none."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors under our names (names.py), whichever tool wrote them."""

    format: str
    """What was read, in words."""
    tensors: dict[str, Stored]
    args: dict[str, Any] = field(default_factory=dict)
    """Megatron's own account of the model."""
    skipped: tuple[str, ...] = ()
    """What holds no weights of its own, and why it was left."""
    warnings: tuple[str, ...] = ()
    tensor_parallel: int = 1
    files: tuple[str, ...] = ()
    """The files that hold all this."""
    copies: dict[str, tuple[str, Stored]] = field(default_factory=dict)
    """Under the writer's key: (the tensor of ours that it must be equal to, the copy)."""
    heads: Heads | None = None


def whole(tensor: Tensor, origin: str) -> Stored:
    """A tensor as it lies in a (mapped) file.

    Raises:
        DataError: it is of a kind that no model has, or says it is larger than what is stored of it.
    """
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        raise DataError(f"{origin}: is {tensor.layout} {tensor.dtype}; expected a dense tensor of a type that weights have")
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        stored = tensor.untyped_storage().nbytes()
        raise DataError(f"{origin}: {tuple(tensor.shape)} would be {tensor.nbytes:,} bytes, the file holds {stored:,} of it")
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor, (origin,))


def derived(parts: Sequence[Stored], function: Callable[[list[Tensor]], Tensor], how: str) -> Stored:
    """One tensor made from several.

    Raises:
        DataError: the function cannot take tensors of these shapes.
    """
    origins = tuple(origin for part in parts for origin in part.origins)
    try:
        blank = function([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts])
    except (RuntimeError, ZeroDivisionError) as error:
        shapes = ", ".join(str(part.shape) for part in parts)
        raise DataError(f"{origins[0]}: cannot {how} tensors of shape {shapes}: {str(error).splitlines()[0]}") from error
    before = tuple(dict.fromkeys(step for part in parts for step in part.how))
    return Stored(tuple(blank.shape), blank.dtype, lambda: function([part.read() for part in parts]), origins, (*before, how))


def alike(copies: Sequence[Stored], how: str) -> Stored:
    """What several places must hold alike.

    Raises:
        DataError: they do not: of differing shape at once, of differing content when it is read.
    """
    first = copies[0]
    for other in copies[1:]:
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{other.origins[0]}: {other.shape} {other.dtype}, but {first.origins[0]} is {first.shape} {first.dtype}"
            )

    def read(parts: list[Tensor]) -> Tensor:
        for part, stored in zip(parts[1:], copies[1:], strict=True):
            if not part.is_meta and not torch.equal(part, parts[0]):
                raise DataError(f"{stored.origins[0]}: must be equal to {first.origins[0]}, and is not")
        return parts[0]

    return first if len(copies) == 1 else derived(copies, read, how)
