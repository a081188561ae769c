"""Which rows a step takes: a pure function of the seed and the step, so there is no sampler state to save or to lose.

The rows of all epochs stand in one line, each epoch its own permutation; a step takes the next `batch_size` of them. Nothing
is dropped at an epoch's end. A global batch does not depend on the number of processes; each takes its share of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from rlhf.config.sections import Schedule
from rlhf.digest import text_digest

Item = TypeVar("Item")


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything printable: the run's seed, a purpose, a step."""
    return int(text_digest("|".join(map(str, parts)))[:16], 16) >> 1


def row_seeds(seed: int, prompts: Sequence[int]) -> list[int]:
    """One seed a reply, from its prompt's index and how often that prompt came before it in the iteration.

    Neither the rank nor the rows beside it are in it: a reply is the same whoever samples it, and no two are alike by seed.
    """
    seen: Counter[int] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(seed_of(seed, prompt, seen[prompt]))
        seen[prompt] += 1
    return seeds


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int) -> list[int]:
    """A permutation of range(count)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


class Batches:
    """Row indices of each step's global batch: `batches[step]`.

    Args:
        count: rows there are.
        size: rows in a batch; the last batch of the last epoch may be short.
        schedule: says how many epochs there are, or that there is no end to them.
    """

    def __init__(self, count: int, size: int, seed: int, schedule: Schedule) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.rows = schedule.length * count if schedule.unit == "epochs" else None
        self.length = schedule.length if self.rows is None else math.ceil(self.rows / size)
        """The run's length: in steps, or in tokens if that is the schedule's unit."""

    def __getitem__(self, step: int) -> list[int]:
        start, end = step * self.size, (step + 1) * self.size
        places = range(start, end if self.rows is None else min(end, self.rows))
        return [shuffled(self.count, seed_of(self.seed, place // self.count))[place % self.count] for place in places]

    def first_epoch(self) -> list[list[int]]:
        """The batches until each row was in one, or until the run is over: a step takes a token at least."""
        return [self[step] for step in range(min(math.ceil(self.count / self.size), self.length))]


def minibatches(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Row indices of each optimizer step of PPO: every row once an epoch, in a new order from the second epoch on."""
    for epoch in range(epochs):
        order = shuffled(count, seed_of(seed, epoch)) if epoch else range(count)
        yield from chunks(order, size)


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def share(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """This rank's items: every world_size-th, so that rows sorted by length are spread evenly."""
    return list(items[rank::world_size])
