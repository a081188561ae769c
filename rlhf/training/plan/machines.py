"""Machines: how much memory a process has there, and how fast it computes; as said, of a card's data sheet, or measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from rlhf.errors import UsageError
from rlhf.training.memory import available

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

GPU_KEPT_FREE = 0.08
"""Part of a GPU's memory that is not planned with: the CUDA context, workspaces of cuBLAS, and gaps between blocks of torch's
allocator. An assumption; nothing here has been measured on a GPU."""
EAGER_SECONDS_PER_LAYER = 0.8e-3
"""That a GPU takes at least for a layer and one token of all rows, a kernel started for each operator: 25 ms for 32 layers, as
transformers' eager models of 7B are usually reported to take. An assumption, never measured here."""
CPU_GAPS = 0.7
"""What glibc's heap may hold beyond live tensors, as a part of what comes and goes: blocks below 32 MiB are not given back to
the system. Seen of a model of 22 million weights: 0.6 to 0.7, a peak 1.4 to 1.5 times what was alive (docs/planning.md)."""
CPU_PROCESS = 0.45e9
"""Bytes of a process that has imported everything and opened nothing (docs/planning.md)."""


class Card(NamedTuple):
    """Peak TFLOP/s without sparsity, GB/s and GB of memory, of the maker's data sheet."""

    fp32: float
    bf16: float
    fp8: float | None
    bandwidth: float
    memory: float


CARDS = {
    "A10": Card(31.2, 125, None, 600, 24),
    "A100-40GB": Card(19.5, 312, None, 1555, 40),
    "A100": Card(19.5, 312, None, 2039, 80),
    "A800": Card(19.5, 312, None, 2039, 80),
    "B200": Card(75, 2250, 4500, 7700, 180),
    "H100-PCIe": Card(51, 756, 1513, 2000, 80),
    "H100": Card(67, 989, 1979, 3350, 80),
    "H200": Card(67, 989, 1979, 4800, 141),
    "H20": Card(44, 148, 296, 4000, 96),
    "H800": Card(67, 989, 1979, 3350, 80),
    "L4": Card(30.3, 121, 242, 300, 24),
    "L40S": Card(91.6, 362, 733, 864, 48),
    "RTX3090": Card(35.6, 71, None, 936, 24),
    "RTX4090": Card(82.6, 165, 330, 1008, 24),
    "MI300X": Card(163.4, 1307, 2615, 5300, 192),
}
"""By name; longer names come before the shorter ones that they begin with where a device is looked up."""


@dataclass(frozen=True)
class Machine:
    """One process has a card of its own; on a CPU all share the memory."""

    name: str
    kind: str
    """cpu or cuda"""
    memory: float | None
    """Bytes: of each card, or of the whole machine; None: not said, so that nothing is said to fit or not"""
    flops: float | None
    """Per second at most, of a card or of a process; None: not known, so that no time is told"""
    bandwidth: float | None
    """Bytes of memory per second, of a card or process"""
    mfu: float
    """Part of `flops` that a pass reaches"""
    source: str
    """Where the figures are from, in words"""

    @property
    def seconds_per_layer(self) -> float:
        """That a layer takes at least for the next token of all rows."""
        return EAGER_SECONDS_PER_LAYER if self.kind == "cuda" else 0.0

    def room(self, processes: int) -> float | None:
        """Bytes that one of the processes may take."""
        if self.memory is None:
            return None
        return self.memory * (1 - GPU_KEPT_FREE) if self.kind == "cuda" else self.memory / processes


def bytes_in(text: str, flag: str) -> float:
    """Raises UsageError where it is no amount of memory: `80GB`, `24GiB`, `512 MB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    size = float(found[1]) * UNITS.get(found[2].upper(), 0) if found else 0
    if not size:
        raise UsageError(f"{flag}: given `{text}`, expected a number and a unit, as in 80GB or 24GiB ({', '.join(UNITS)})")
    return size


def card_named(name: str) -> tuple[str, Card] | None:
    """The card of a name such as `h100`, or `NVIDIA H100 80GB HBM3`."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return next(
        (
            (known, CARDS[known])
            for known in sorted(CARDS, key=len, reverse=True)
            if re.sub(r"[^a-z0-9]", "", known.lower()) in plain
        ),
        None,
    )


def described(card: str, precision: str, fp8: bool) -> Machine:
    """A machine of cards that are not here. Raises UsageError for one that is not in the table."""
    found = card_named(card)
    if found is None:
        raise UsageError(f"--card {card}: not in the table; there are {', '.join(CARDS)}; or give --gpu-memory and --flops")
    return _of(*found, precision, fp8)


def this_machine(precision: str, fp8: bool) -> Machine:
    """What is here: its first GPU, or the CPU, whose speed is measured."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = card_named(properties.name)
        if found is None:
            return Machine(properties.name, "cuda", properties.total_memory, None, None, 0.4, "of this machine")
        return replace(_of(*found, precision, fp8), memory=properties.total_memory, name=properties.name)
    flops, bandwidth = _measured(torch.bfloat16 if precision == "bf16" else torch.float32)
    threads = torch.get_num_threads()
    source = f"this machine's CPU, measured on {threads} thread{'s' if threads > 1 else ''}"
    return Machine("CPU", "cpu", available(torch.device("cpu")), flops, bandwidth, 0.6, source)


def _of(name: str, card: Card, precision: str, fp8: bool) -> Machine:
    peak = card.fp8 if fp8 and card.fp8 else card.bf16 if precision == "bf16" else card.fp32
    return Machine(name, "cuda", card.memory * 1e9, peak * 1e12, card.bandwidth * 1e9, 0.4, "the card's data sheet")


def _measured(dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a product of square matrices, bytes/s of reading a large one), the best of a few."""
    size, generator = 768, torch.Generator().manual_seed(0)
    matrix = torch.rand(size, size, generator=generator).to(dtype)
    large = torch.rand(2**23, generator=generator)
    return 2 * size**3 / _fastest(lambda: matrix @ matrix), large.nbytes / _fastest(large.sum)


def _fastest(act: object, tries: int = 5) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        act()  # pyright: ignore[reportCallIssue]
        seconds.append(time.perf_counter() - start)
    return min(seconds)
