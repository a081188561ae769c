"""What a stage says of a file it has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.data.examples import Examples

FEW = 30
"""Rows; an interval of fewer is marked. Wilson's is then 17 points and more to either side of one half."""


def remarks(path: str, found: Examples[Any], what: str, earlier: Mapping[str, set[bytes]], held_out: bool) -> list[str]:
    """One sentence each: how much there is of it, what became of the rest, and what figures on it are worth.

    Args:
        what: what the rows have become ("pairs").
        earlier: file -> what the rows ask that were read of it before.
        held_out: whether the file is the one that figures come from.
    """
    said = [f"{path}: {len(found.items)} {what}", *found.notes]
    for other, asked in earlier.items():
        if shared := sum(row in asked for row in found.asked):
            said.append(
                f"warning: {shared} of the {len(found.asked)} rows of {path} ask what rows of {other} ask: "
                "figures on them say less of prompts never seen"
            )
    if held_out and len(found.items) < FEW:
        said.append(f"warning: figures on {len(found.items)} held-out rows say little; hold out {FEW} or more")
    return said
