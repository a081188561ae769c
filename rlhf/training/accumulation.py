"""How a global batch is divided: into minibatches, over ranks, into micro-batches. Pure functions of sizes.

Losses are sums divided once by the global count of tokens (or pairs), so no division here changes an update but in rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from rlhf.data.order import share

Item = TypeVar("Item")


class MicroBatch(NamedTuple):
    """`weight` is 1, or 0 for a stand-in that keeps ranks in step and must not count."""

    items: list
    weight: float


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def micro_batches(items: Sequence[Item], size: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch; as many on every rank, since each forward may be a collective."""
    mine = [MicroBatch(chunk, 1.0) for chunk in chunks(share(items, rank, world_size), size)]
    count = math.ceil(math.ceil(len(items) / world_size) / size)
    return mine + [MicroBatch(list(items[:1]), 0.0)] * (count - len(mine))
