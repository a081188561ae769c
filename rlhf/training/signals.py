"""Signals ask a run to stop at its next step boundary; a second one ends it at once.

So does the first, if another process of the run is gone: then it is the launcher that ends the others, and no boundary comes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from rlhf.errors import LostRank

HANDLED = (signal.SIGTERM, signal.SIGINT)

ONE_SIGNAL_SECONDS = 1.0
"""Who stops a whole job (systemd, Slurm) signals the launcher and its processes, and the launcher passes it on: what comes
again so soon is the same signal."""


class StopRequest:
    """`number` is the signal that came, 0 while there is none; running out of time counts as SIGTERM."""

    def __init__(self, max_hours: float | None) -> None:
        self.number, self.came = 0, 0.0
        self.end_at_once_if: Callable[[], str] = lambda: ""
        """Why nothing is left to be waited for, if so."""
        self.before_ending_at_once: Callable[[int], None] = lambda number: None
        self.deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self.before = {number: signal.signal(number, self._handle) for number in HANDLED}

    def pending(self) -> int:
        if self.deadline is not None and time.monotonic() > self.deadline:
            return self.number or signal.SIGTERM
        return self.number

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ending(self) -> None:
        """From now on the run ends, for whatever reason; signals have nothing to add to it."""
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if time.monotonic() - self.came > ONE_SIGNAL_SECONDS:
                self.before_ending_at_once(number)
                os._exit(128 + number)
            return
        if why := self.end_at_once_if():
            raise LostRank(why)
        self.number, self.came = number, time.monotonic()
