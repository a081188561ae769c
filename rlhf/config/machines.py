"""Which machines a run is spread over, as the command line of one of them says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.errors import UsageError

PORT = 29500
"""torch.distributed's own default."""


@dataclass(frozen=True)
class Machines:
    """`rank` is this machine's number; number 0, at `address`, keeps the run's books."""

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = PORT


ONE_MACHINE = Machines()


def machines_of(words: Mapping[str, str]) -> Machines | None:
    """From the flags num-machines, machine-rank and main-address; None where there are none.

    Raises:
        UsageError: a number that is none, a rank of no machine, or an address that is missing.
    """
    count, rank = whole_number(words, "num-machines", 1, 1), whole_number(words, "machine-rank", 0, 0)
    address = words.get("main-address", "")
    if count == 1:
        if idle := {"machine-rank", "main-address"} & set(words):
            raise UsageError(f"--{min(idle)}: has no meaning on one machine; give --num-machines, too")
        return ONE_MACHINE if "num-machines" in words else None
    if rank >= count:
        raise UsageError(f"--machine-rank: given {rank}, expected 0 to {count - 1}: there are {count} machines")
    host, _, port = address.partition(":")
    if not host or (port and not _is_port(port)):
        raise UsageError(
            f"--main-address: given `{address}`, expected HOST or HOST:PORT of machine 0, as the others reach it (port: {PORT})"
        )
    return Machines(count, rank, host, int(port) if port else PORT)


def whole_number(words: Mapping[str, str], name: str, default: int, least: int) -> int:
    """The value of a flag. Raises UsageError where it is no whole number, or below `least`."""
    text = words.get(name, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UsageError(f"--{name}: given `{text}`, expected a whole number, at least {least}")
    return int(text)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16
