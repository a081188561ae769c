"""The fixtures of worlds.py, which tests/stages has as well, and a watch on what tests leave behind."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress

import psutil
import pytest
from worlds import llamas, reward, world

__all__ = ["llamas", "reward", "started", "world"]


@pytest.fixture
def started(monkeypatch):
    """Lists the programs that the test has started, by whichever process; five seconds after its end none is left."""
    mark = secrets.token_hex()
    monkeypatch.setenv("STARTED_BY_TEST", mark)

    def running() -> list[str]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("STARTED_BY_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid}: {' '.join(process.cmdline())}")
        return found

    yield running
    deadline = time.monotonic() + 5
    while left := running():
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
