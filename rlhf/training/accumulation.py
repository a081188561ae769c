"""How a global batch is divided: into minibatches, over ranks, into micro-batches. Pure functions of sizes.

Losses are sums divided once by the global count of tokens (or pairs), so no division here changes an update but in rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from rlhf.data.order import chunks, share

Item = TypeVar("Item")


class MicroBatch(NamedTuple):
    """`weight` is 1, or 0 for a stand-in that keeps ranks in step and must not count."""

    items: list
    weight: float


def micro_batches(items: Sequence[Item], size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch; as many on every rank, since each forward may be a collective."""
    mine = [MicroBatch(chunk, 1.0) for chunk in chunks(share(items, rank, world_size), size)]
    count = math.ceil(math.ceil(len(items) / world_size) / size)
    return mine + [MicroBatch(list(items[:1]), 0.0)] * (count - len(mine))


def rank_of_rows(count: int, minibatch_size: int, world_size: int) -> list[int]:
    """Which rank has a row of an iteration of PPO in `scoring_micro_batches`."""
    places = range(world_size)
    parts = [(rank, share(mini, rank, world_size)) for mini in chunks(range(count), minibatch_size) for rank in places]
    return [rank for _, rank in sorted((row, rank) for rank, rows in parts for row in rows)]


def scoring_micro_batches(count: int, minibatch_size: int, size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's rows of an iteration of PPO, in the very micro-batches in which the first epoch takes them."""
    return [micro for mini in chunks(range(count), minibatch_size) for micro in micro_batches(mini, size, rank, world_size)]
