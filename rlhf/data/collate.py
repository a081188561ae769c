"""Rows of tokens into the input of one forward pass: one after the other in one sequence, without pads.

A pad costs as much as a token in every matrix product, so there are none; rows are kept apart by their lengths, which is
what attention goes by. Rows that begin with the same prompt may share it: its tokens then stand in the sequence once, and
each reply attends to the prompt and to itself. What a model needs that cannot do this is the model's affair (models/trunk.py).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data.examples import PairExample, RankedExample, RatedExample, SftExample


class Row(NamedTuple):
    prompt: list[int]
    reply: list[int]
    read: Sequence[int]
    """Places in prompt + reply that the heads read, from 0."""


class Segment(NamedTuple):
    """Neighbouring tokens of the sequence: a whole row, a prompt that several rows begin with, or the rest of such a row."""

    start: int
    length: int
    parent: int | None = None
    """Number of the segment that it continues."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows as one sequence of S tokens, the one input of a model's forward; heads read it at K places, row by row."""

    ids: Tensor
    """(S,)"""
    position_ids: Tensor
    """(S,), from 0 at the first token of a row"""
    read: Tensor
    """(K,) places in the sequence"""
    targets: Tensor
    """(K,) the tokens after them, whose log-probabilities an LM head gives; 0 after the last token of a row"""
    segments: tuple[Segment, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Of each segment its own tokens: on the host, whatever device `ids` are on."""

    def to(self, device: torch.device) -> TokenBatch:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def token_batch(rows: Iterable[Row], share_prompts: bool = True) -> TokenBatch:
    """The rows in their order; a prompt stands before the first row that begins with it."""
    rows = list(rows)
    asked = Counter(tuple(row.prompt) for row in rows if row.prompt and row.reply and share_prompts)
    ids: list[int] = []
    positions: list[int] = []
    read: list[int] = []
    targets: list[int] = []
    segments: list[Segment] = []
    prompts: dict[tuple[int, ...], int] = {}

    def add(tokens: Sequence[int], parent: int | None = None) -> int:
        """The number of a new segment."""
        first = 0 if parent is None else segments[parent].length
        segments.append(Segment(len(ids), len(tokens), parent))
        ids.extend(tokens)
        positions.extend(range(first, first + len(tokens)))
        return len(segments) - 1

    for prompt, reply, places in rows:
        key = tuple(prompt)
        if reply and asked[key] > 1:
            if key not in prompts:
                prompts[key] = add(prompt)
            begins, continues = segments[prompts[key]].start, len(ids)
            add(reply, prompts[key])
        else:
            begins, continues = len(ids), len(ids) + len(prompt)
            add([*prompt, *reply])
        whole = [*prompt, *reply, 0]
        for place in places:
            if place < 0:
                raise ValueError("nothing stands before the first token of a row: its prompt is empty")
            read.append(begins + place if place < len(prompt) else continues + place - len(prompt))
            targets.append(whole[place + 1])
    tokens = tuple(tuple(ids[start : start + length]) for start, length, _ in segments)
    flat = [torch.tensor(values, dtype=torch.long) for values in (ids, positions, read, targets)]
    return TokenBatch(flat[0], flat[1], flat[2], flat[3], tuple(segments), tokens)


def reply_row(prompt: list[int], reply: list[int]) -> Row:
    """Read where each token of the reply is predicted."""
    return Row(prompt, reply, range(len(prompt) - 1, len(prompt) + len(reply) - 1))


def last_row(prompt: list[int], reply: list[int]) -> Row:
    """Read at its last token."""
    return Row(prompt, reply, [len(prompt) + len(reply) - 1])


def sft_batch(examples: Iterable[SftExample]) -> TokenBatch:
    """Read where a trained token is predicted; the first of a row is predicted by nothing."""
    return token_batch(Row([], example.ids, trained_places(example)) for example in examples)


def trained_places(example: SftExample) -> list[int]:
    return [place - 1 for place, trained in enumerate(example.trained) if trained and place > 0]


def ranking_batch(examples: Iterable[RankedExample | PairExample]) -> TokenBatch:
    """Every reply once, read at its last token: prompt by prompt, in the order of its replies (a pair: chosen first)."""
    return token_batch(last_row(example.prompt, reply) for example in examples for reply in example.replies)


class Comparisons(NamedTuple):
    """The P pairs that the prompts of a ranking batch have been made into."""

    better: Tensor
    """(P,) places among the batch's replies"""
    worse: Tensor
    """(P,)"""
    target: Tensor
    """(P,) probability that the first is the better one: 1, for a tie 0.5"""
    margin: Tensor
    """(P,)"""
    weight: Tensor
    """(P,) the pairs of a prompt sum to 1"""
    decided: Tensor
    """(P,) the same without ties, whose weight here is 0"""


def comparisons(examples: Iterable[RankedExample], like: Tensor) -> Comparisons:
    """Numbers in the dtype and on the device of `like`.

    A prompt counts once, however many replies it has (Ouyang et al. 2022, arXiv:2203.02155, equation 1).
    """
    rows: list[tuple[int, int, float, float, float, float]] = []
    first = 0
    for example in examples:
        pairs, ties = example.comparisons, sum(pair.tie for pair in example.comparisons)
        for better, worse, tie in pairs:
            decided = 0.0 if tie else 1 / (len(pairs) - ties)
            rows.append((first + better, first + worse, 0.5 if tie else 1.0, example.margin, 1 / len(pairs), decided))
        first += len(example.replies)
    better, worse, *numbers = zip(*rows, strict=True) if rows else [()] * 6
    places = [torch.tensor(place, dtype=torch.long, device=like.device) for place in (better, worse)]
    return Comparisons(*places, *(like.new_tensor(number) for number in numbers))


def reply_batch(examples: Iterable[PairExample | RatedExample]) -> TokenBatch:
    """Every reply of every example, in their order, read where its tokens are predicted; the prompt stands there once."""
    return token_batch(reply_row(example.prompt, reply) for example in examples for reply in example.replies)


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
