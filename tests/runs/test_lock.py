"""One writer a run, across processes, and free again however the writer ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.errors import Locked
from rlhf.runs.lock import check_unlocked, run_lock

HOLD = """
import sys, time
from pathlib import Path
from rlhf.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_about_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    told = rf"pid {holder.pid} on {os.uname().nodename}, started 20\d\d-"
    with pytest.raises(Locked, match=told), run_lock(tmp_path / "run"):
        pass
    with pytest.raises(Locked, match=told):
        check_unlocked(tmp_path / "run")


def test_kill_releases(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    check_unlocked(tmp_path / "run")
    with run_lock(tmp_path / "run"):
        pass


def test_released_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path), pytest.raises(Locked, match=f"pid {os.getpid()}"):
        check_unlocked(tmp_path)
    check_unlocked(tmp_path)


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    check_unlocked(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
