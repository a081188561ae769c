"""Asking again what may answer the next time."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from rlhf.errors import without_secrets

Answer = TypeVar("Answer")

LONGEST_PAUSE_S = 30.0


class FailedTry(Exception):
    """A try that came to nothing and may be made again, after so many seconds at least."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


def with_retries(source: str, retries: int, ask: Callable[[], Answer], first_pause_s: float = 0.0) -> Answer:
    """The first answer; each try that fails is told on standard error, and the pause after it is twice the one before.

    Raises: FailedTry: the last of them, telling of whom and of which try.
    """
    for number in range(retries + 1):
        try:
            return ask()
        except FailedTry as failure:
            told = without_secrets(f"{source}: {failure} (try {number + 1} of {retries + 1})")
            if number == retries:
                raise FailedTry(told) from None
            print(f"rlhf: {told}; tried again", file=sys.stderr, flush=True)
            # Pauses differ, so that ranks do not all come back at once; the global generator is the run's own.
            pause = min(LONGEST_PAUSE_S, first_pause_s * 2**number) * random.SystemRandom().uniform(0.5, 1.5)
            time.sleep(max(pause, failure.wait_s))
    raise AssertionError("there is at least one try")
