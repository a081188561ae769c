"""The form of what is known about a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["metric", "check", "alarm", "exit code"]


@dataclass(frozen=True)
class Entry:
    """One row of a table. A name with `*` stands for every name of that form."""

    name: str
    what: str
    """What it is, with its unit."""
    healthy: str
    otherwise: str
    """What it means where it is not so."""
    causes: tuple[str, str, str]
    """The likeliest first."""
    do: str
    kind: Kind = "metric"
