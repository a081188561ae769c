"""Whether processes can add up tensors together, and how fast: the first thing a run of several does."""

from __future__ import annotations

import statistics
import time

import torch

from rlhf.errors import CheckFailed

ELEMENTS = 1 << 22
"""16 MiB of float32: large enough that the wires count and not the start of the exchange."""
REPETITIONS = 3


def all_reduce_speed(device: torch.device, world_size: int) -> str:
    """Adds known numbers over all ranks, and says how fast.

    The algorithm's bandwidth is bytes / time of one rank's tensor. A ring sends every byte 2 (n - 1) / n times over each link
    (Patarasso and Yuan 2009), hence the bus bandwidth; where the backend uses no ring, it is only a number to compare by.

    Raises:
        CheckFailed: the sum is wrong.
    """
    rank = torch.distributed.get_rank()
    pattern = torch.arange(ELEMENTS, device=device, dtype=torch.float32) % 1021
    expected = pattern * world_size + world_size * (world_size - 1) / 2  # whole numbers, which float32 adds exactly
    seconds = []
    for _ in range(REPETITIONS):
        tensor = pattern + rank
        torch.distributed.barrier()
        start = time.monotonic()
        torch.distributed.all_reduce(tensor)
        _wait(device)
        seconds.append(time.monotonic() - start)
        wrong = torch.nonzero(tensor != expected)
        if len(wrong):
            place = int(wrong[0])
            raise CheckFailed(
                f"all-reduce over {world_size} processes is wrong at element {place} on rank {rank}: {float(tensor[place])}, "
                f"expected {float(expected[place])}; the network or its driver corrupts data"
            )
    algorithm = ELEMENTS * 4 / statistics.median(seconds) / 1e9
    bus = algorithm * 2 * (world_size - 1) / world_size
    return f"all-reduce of 16 MiB over {world_size} processes is right: {algorithm:.2f} GB/s, over a ring {bus:.2f} GB/s a link"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
