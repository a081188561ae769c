"""Which rows a step takes: a pure function of the seed and the step, so there is no sampler state to save or to lose.

The rows of all epochs stand in one line, each epoch its own permutation; a step takes the next `batch_size` of them. Nothing
is dropped at an epoch's end. A global batch does not depend on the number of processes; each takes its share of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import torch

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


def batch_indices(step: int, batch_size: int, count: int, seed: int, epochs: int | None = None) -> list[int]:
    """Row indices of a step's global batch; the last batch of the last epoch may be short, none is empty before it."""
    end = (step + 1) * batch_size
    if epochs is not None:
        end = min(end, epochs * count)
    return [shuffled(count, seed_of(seed, place // count))[place % count] for place in range(step * batch_size, end)]


def steps_in(epochs: int, batch_size: int, count: int) -> int:
    return math.ceil(epochs * count / batch_size)


def share(items: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """This rank's items: every world_size-th, so that rows sorted by length are spread evenly."""
    return list(items[rank::world_size])
