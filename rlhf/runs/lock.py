"""One writer a run directory: an flock on RUN/.lock, which the kernel releases however the process ends.

flock is not dependable on every network file system; the file therefore also says who holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rlhf.errors import Locked, OutputError
from rlhf.runs.manifest import now


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run directory, made if missing.

    Raises:
        Locked: another process holds it; the message names its pid, host and start.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+", encoding="utf-8") as stream:
        if not _take(stream, fcntl.LOCK_EX):
            raise _locked(run, stream)
        # In place: a new file under the same name would carry a lock of its own.
        stream.truncate(0)
        stream.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": now()}))
        stream.flush()
        yield


def check_unlocked(run: Path) -> None:
    """Leaves no trace in the run, unlike `run_lock`.

    Raises:
        Locked: as `run_lock`.
    """
    if (run / ".lock").is_file():
        with (run / ".lock").open(encoding="utf-8") as stream:
            if not _take(stream, fcntl.LOCK_SH):
                raise _locked(run, stream)


def check_output(directory: Path) -> None:
    """Make sure that the directory could be made and written, without making it.

    Raises:
        OutputError: it could not; the message names what stands in the way.
    """
    place = directory.absolute()
    try:
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long
        raise OutputError(f"{directory}: cannot be made: {error.strerror}; choose another --output") from error
    place = existing(place)
    if not place.is_dir():
        raise OutputError(f"{directory}: cannot be made: {place} is not a directory; choose another --output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{directory}: no permission to write in {place}; choose another --output")


def existing(path: Path) -> Path:
    """The path, or the nearest above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))


def _take(stream: TextIO, kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _locked(run: Path, stream: TextIO) -> Locked:
    stream.seek(0)
    try:
        holder = json.load(stream)
    except ValueError:  # the other process is between taking the lock and saying so
        return Locked(f"{run}: another run is writing here; wait for it, or choose another --output")
    return Locked(
        f"{run}: another run is writing here: pid {holder['pid']} on {holder['host']}, started {holder['started']}; "
        "wait for it, or choose another --output"
    )
