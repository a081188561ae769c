"""Turns between processes that are measured side by side: each takes a step, says what it cost, and waits until it is told on.

A busy or throttled machine so slows all of them alike, and imports, loading and warm-up are paid once. This is a child's end of
it, standard library only, as the peers' environments import it too; _sides.py is the parent's.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

MARK = "TURN "


class Turns:
    """A turn lasts from `begin` to `end`, which begins the next. CPU seconds are those of all threads of this process."""

    def __init__(self) -> None:
        self.said = sys.stdout  # a stage's console may put something else in its place
        self.begin()

    def begin(self) -> None:
        """What was spent since the last turn is not counted."""
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def end(self, cpu_s: float | None = None, **more: Any) -> None:
        """Says what the turn cost, `cpu_s` where that is more than this process, with what else is to be told."""
        spent = time.process_time() - self.cpu if cpu_s is None else cpu_s
        cost = {"cpu_s": spent, "wall_s": time.perf_counter() - self.wall, "peak_mib": peak_mib()}
        print(MARK + json.dumps(cost | more), file=self.said, flush=True)
        if not sys.stdin.readline():  # whoever asked has gone
            sys.exit(1)
        self.begin()


def peak_mib() -> int:
    """Of this process, from its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
