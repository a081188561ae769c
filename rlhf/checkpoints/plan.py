"""What a conversion will do, before it does it: every tensor, where it comes from, where it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.checkpoints.stored import Stored

Kind = Literal["safetensors", "pt", "distcp"]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that is to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    where: tuple[str, tuple[int, ...], tuple[int, ...]] = ("", (), ())
    """in a .distcp file: the whole tensor's key, this piece's offset, the whole's size"""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class TargetFile:
    """A file that is to be written, with its tensors."""

    name: str
    kind: Kind
    entries: dict[str, Entry] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)
    """what is in it beside tensors; in a .distcp file under keys of their own"""


@dataclass(frozen=True)
class Step:
    """One tensor of ours: read, taken apart, written."""

    ours: str
    source: Stored
    split: Callable[[Tensor], Sequence[Tensor]]
    how: str
    targets: tuple[tuple[str, str], ...]
    """(file, key) of each part, in the order of `split`"""


@dataclass(frozen=True)
class Check:
    """A tensor that is not written, and what must hold of it: equal to another, or zero."""

    key: str
    stored: Stored
    equal_to: Stored | None


@dataclass
class Target:
    """All that a format's writer lays out."""

    format: str
    files: dict[str, TargetFile] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    """small files: their names and what is in them"""

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for file in self.files.values() for entry in file.entries.values())


def parts_of(stored: Stored, split: Callable[[Tensor], Sequence[Tensor]]) -> list[tuple[int, ...]]:
    """The shapes that taking a tensor apart gives, without reading it."""
    return [tuple(part.shape) for part in split(torch.empty(stored.shape, dtype=stored.dtype, device="meta"))]
