"""Token ids of several rows into the tensors of one forward pass.

Masks come from lengths, never from comparing ids with the pad id: pad may equal EOS. Pads are at the right in SFT and RM, so
a causal model never sees them; prompts of a rollout are padded at the left, where the mask and the position ids hide them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.data.examples import PairExample, SftExample
from rlhf.functional.masked import position_ids
from rlhf.functional.sft import IGNORED


@dataclass(frozen=True)
class TokenBatch:
    """B rows of L positions, the one input of a model's forward."""

    input_ids: Tensor
    """(B, L)"""
    attention_mask: Tensor | None
    """(B, L), 1 at real tokens; None: rows are packed, and a position id that does not grow by one starts the next."""
    position_ids: Tensor
    """(B, L), from 0 at the first real token"""
    keep: int = 0
    """Heads are applied to the last `keep` positions only; 0: to all."""

    def to(self, device: torch.device) -> TokenBatch:
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return replace(
            self, input_ids=self.input_ids.to(device), attention_mask=mask, position_ids=self.position_ids.to(device)
        )


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (B, longest row)."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), value)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, where] = torch.tensor(row, dtype=torch.long)
        mask[index, where] = 1
    return ids, mask


def token_batch(input_ids: Tensor, mask: Tensor, keep: int = 0) -> TokenBatch:
    return TokenBatch(input_ids, mask, position_ids(mask), keep)


def sft_batch(examples: Sequence[SftExample], pad_id: int) -> tuple[TokenBatch, Tensor]:
    """(batch, labels (B, L)); one example a row."""
    ids, mask = pad([example.ids for example in examples], pad_id)
    return token_batch(ids, mask), _labels(ids, [example.trained for example in examples])


def packed_batch(packs: Sequence[Sequence[SftExample]], pad_id: int) -> tuple[TokenBatch, Tensor]:
    """(batch, labels); each row holds several examples that do not see each other.

    The model tells them apart by position ids that start again; a pad is an example of its own, one token long. The first
    token of an example has no label: nothing before it may predict it.
    """
    ids, _ = pad([[i for example in pack for i in example.ids] for pack in packs], pad_id)
    positions = torch.zeros_like(ids)
    for row, pack in enumerate(packs):
        joined = torch.cat([torch.arange(len(example)) for example in pack])
        positions[row, : len(joined)] = joined
    trained = [[t and i > 0 for example in pack for i, t in enumerate(example.trained)] for pack in packs]
    return TokenBatch(ids, None, positions), _labels(ids, trained)


def pack(examples: Sequence[SftExample], length: int) -> list[list[SftExample]]:
    """Best-fit decreasing: each pack holds at most `length` tokens."""
    packs: list[list[SftExample]] = []
    open_packs: list[tuple[int, int]] = []  # (free tokens, index), sorted: a search costs a bisection, not a pass over all
    for example in sorted(examples, key=len, reverse=True):
        fit = bisect_left(open_packs, (len(example), 0))
        if fit < len(open_packs):
            free, index = open_packs.pop(fit)
        else:
            free, index = length, len(packs)
            packs.append([])
        packs[index].append(example)
        if free > len(example):
            insort(open_packs, (free - len(example), index))
    return packs


def pair_batch(pairs: Sequence[PairExample], pad_id: int) -> TokenBatch:
    """Both sides in one batch: the chosen replies in the first half of the rows, the rejected in the second."""
    rows = [pair.prompt + pair.chosen for pair in pairs] + [pair.prompt + pair.rejected for pair in pairs]
    return token_batch(*pad(rows, pad_id))


def _labels(ids: Tensor, trained: Sequence[Sequence[bool]]) -> Tensor:
    flags, _ = pad(trained, 0)
    return torch.where(flags.bool(), ids, torch.full_like(ids, IGNORED))
