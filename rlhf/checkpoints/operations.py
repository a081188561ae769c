"""How tensors of one tool become a tensor of another, and back: exact to the bit.

Sizes: H hidden, D head width; `heads` query heads share `groups` key and value heads. Megatron-core stores query, key and value
of each group together: rows (groups, heads / groups + 2, D). That is our own order, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """How attention is divided: `heads` queries over `groups` keys and values."""

    heads: int
    groups: int


class Operation(Protocol):
    """One row of a table: the names on the other side, and how their tensors make ours and come out of it."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def how(self) -> str: ...
    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor: ...
    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]: ...


@dataclass(frozen=True)
class Copy:
    """The same tensor under another name."""

    name: str
    how = "copy"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return parts[0]

    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]:
        return [ours]


@dataclass(frozen=True)
class Transposed(Copy):
    """GPT-2's Conv1D holds (in, out)."""

    how = "transpose"

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return parts[0].t() if parts[0].dim() == 2 else parts[0]

    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]:
        return [ours.t() if ours.dim() == 2 else ours]


@dataclass(frozen=True)
class Offset(Copy):
    """OPT's positions start at row 2; the rows before belong to pads, which attention never sees, and come back as zeros.

    Source: transformers, modeling_opt.py, OPTLearnedPositionalEmbedding.
    """

    rows: int = 2
    how = "leave out the rows of pads"

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return parts[0][self.rows :]

    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]:
        return [concatenated([ours.new_zeros(self.rows, ours.shape[1]), ours])]


@dataclass(frozen=True)
class Qkv:
    """Query, key and value apart, each in the order of its heads."""

    query: str
    key: str
    value: str
    how = "query, key and value by group"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        query, key, value = parts
        return join_qkv(query, key, value, heads)

    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]:
        return list(split_qkv(ours, heads))


@dataclass(frozen=True)
class BlockQkv(Copy):
    """One tensor: all queries, then all keys, then all values; `transposed` as in GPT-2's Conv1D."""

    transposed: bool = False
    how = "query, key and value by group"

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        block = parts[0].t() if self.transposed and parts[0].dim() == 2 else parts[0]
        width = block.shape[0] // (heads.heads + 2 * heads.groups)
        query, key, value = block.split([heads.heads * width, heads.groups * width, heads.groups * width])
        return join_qkv(query, key, value, heads)

    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]:
        block = concatenated(split_qkv(ours, heads))
        return [block.t() if self.transposed and block.dim() == 2 else block]


@dataclass(frozen=True)
class QueryAndKeyValue:
    """Query alone, key and value of each group together: legacy Megatron with fewer keys than queries."""

    query: str
    key_value: str
    how = "query, key and value by group"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.query, self.key_value)

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        query, both = parts
        key, value = both.view(heads.groups, 2, -1, *both.shape[1:]).unbind(1)
        return join_qkv(query, key.flatten(0, 1), value.flatten(0, 1), heads)

    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]:
        query, key, value = split_qkv(ours, heads)
        grouped = [part.view(heads.groups, -1, *part.shape[1:]) for part in (key, value)]
        return [query, torch.stack(grouped, 1).flatten(0, 2)]


@dataclass(frozen=True)
class Gated:
    """The two halves of a gated MLP's first matrix apart: the one under the activation, then the other."""

    gate: str
    up: str
    how = "gate over up"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        return concatenated(parts)

    def split(self, ours: Tensor, heads: Heads) -> list[Tensor]:
        return list(ours.chunk(2))


def concatenated(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat; on tensors without data that one imports a compiler, which costs a plan most of a second (torch 2.13).

    Raises:
        RuntimeError: the parts are of several types; one of them would be rounded.
    """
    if len({part.dtype for part in parts}) > 1:
        raise RuntimeError(f"they are of several types: {', '.join(str(part.dtype) for part in parts)}")
    if not parts[0].is_meta:
        return torch.cat(list(parts), dim)
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].new_empty(shape)


def split_qkv(fused: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of a weight ((heads + 2 groups) D, H) or a bias; each in the order of its heads."""
    per_group = heads.heads // heads.groups
    parts = fused.view(heads.groups, per_group + 2, -1, *fused.shape[1:])
    q, k, v = (part.reshape(-1, *fused.shape[1:]) for part in parts.split([per_group, 1, 1], dim=1))
    return q, k, v


def join_qkv(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """The inverse of `split_qkv`."""
    width = q.shape[0] // heads.heads
    shapes = ((q, heads.heads // heads.groups), (k, 1), (v, 1))
    parts = [part.reshape(heads.groups, count, width, *part.shape[1:]) for part, count in shapes]
    return concatenated(parts, dim=1).reshape(-1, *q.shape[1:])


def modern_qkv(fused: Tensor, version: float, heads: int) -> Tensor:
    """One rank's query_key_value of `heads` heads in today's order, from the order of its checkpoint version.

    0: (3, heads, D), all queries first; 1: (heads, D, 3); from 2 on (heads, 3, D), which is today's with a group a head.
    Source: Megatron-LM, megatron/checkpointing.py, fix_query_key_value_ordering.
    """
    if version >= 2:
        return fused
    width, rest = fused.shape[0] // (3 * heads), fused.shape[1:]
    if version == 0:
        return fused.view(3, heads, width, *rest).transpose(0, 1).reshape(fused.shape)
    return fused.view(heads, width, 3, *rest).transpose(1, 2).reshape(fused.shape)


def join_ranks(parts: Sequence[Tensor], dim: int, gated: bool = False) -> Tensor:
    """A tensor from its tensor-parallel ranks; `gated`: each rank holds its share of the gate, then its share of up."""
    if len(parts) == 1:
        return parts[0]
    if not gated:
        return concatenated(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return concatenated([half[side] for side in (0, 1) for half in halves], dim)


def split_ranks(ours: Tensor, ranks: int, dim: int, gated: bool = False) -> list[Tensor]:
    """The inverse of `join_ranks`.

    Raises:
        RuntimeError: the dimension does not divide (with `gated`: half of it).
    """
    if not gated:
        return list(ours.split(_share(ours.shape[dim], ranks), dim))
    sides = [half.split(_share(half.shape[dim], ranks), dim) for half in ours.chunk(2, dim)]
    return [concatenated([side[rank] for side in sides], dim) for rank in range(ranks)]


def _share(size: int, ranks: int) -> int:
    if size % ranks:
        raise RuntimeError(f"{size} does not divide by {ranks} ranks")
    return size // ranks
