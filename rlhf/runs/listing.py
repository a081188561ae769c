"""The runs under a directory, and the removal of one that no other needs."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf.errors import DataError, Locked, OutputError
from rlhf.runs.lineage import WRITTEN, run_of
from rlhf.runs.lock import check_unlocked, run_lock
from rlhf.runs.manifest import (
    MANIFEST,
    STATUS,
    has_status,
    is_run,
    manifest_digest,
    read_manifest,
    read_status,
    seconds,
)

KEY_RESULTS = (("after", "score"), ("eval/accuracy", None), ("eval/loss", None))
"""Where in a result the one figure is that says most; the first that is there is shown."""


@dataclass(frozen=True)
class Listed:
    run: str
    stage: str
    state: str
    started: str
    seconds: float | None
    result: dict[str, float]


def runs_under(place: Path) -> list[Listed]:
    """Every run in the directory, at any depth, in the order in which they started; of one that failed before there was
    anything to record, what its status says.

    Raises:
        DataError: there is no such directory.
    """
    if not place.is_dir():
        raise DataError(f"{place}: no such directory; name the one that your runs are in: rlhf runs list DIR")
    return sorted(
        map(_listed, _places(place, begun=True)), key=lambda listed: (datetime.fromisoformat(listed.started), listed.run)
    )


def remove(run: Path, force: bool = False) -> None:
    """Deletes the run's directory.

    Args:
        force: even where other runs were made from it, or it was killed. What another process holds is never deleted.

    Raises:
        DataError: it is no run, holds other runs, or was killed, or another run beside it was made from it.
        Locked: it is in progress.
        OutputError: the system refuses.
    """
    if run.is_symlink() or not (run / MANIFEST).is_file():
        raise DataError(
            f"{run}: not a run (no {MANIFEST} in it, or a link), so it is left alone; `rlhf runs list` names the runs"
        )
    read_manifest(run)
    if inner := [place for place in _places(run) if place.resolve() != run.resolve()]:
        raise DataError(f"{run}: holds another run, {inner[0]}; remove that first")
    check_unlocked(run)
    status = read_status(run)
    if not force and status is not None and status["state"] == "running":  # on another machine a lock may not be seen
        raise DataError(f"{run}: says that it is running, on {status['host']}; if it was killed, --force removes it")
    if not force and (others := made_from(run)):
        raise DataError(f"{run}: made from it: {', '.join(map(str, others))}; --force removes it all the same")
    try:
        with run_lock(run):
            shutil.rmtree(run.resolve())  # of `.` the system removes all but the directory itself
    except OSError as error:
        raise OutputError(f"{run}: cannot be removed: {error}") from error


def made_from(run: Path) -> list[Path]:
    """Runs beside this one, or under a directory beside it, that read something of it, by its place or its manifest."""
    own, digest = run.resolve(), manifest_digest(run)
    return [
        place
        for place in _places(own.parent)
        if place.resolve() != own
        and any(
            entry["parent"] == digest or (entry["digest"] is not None and _maker(place, entry["path"]) == own)
            for entry in read_manifest(place)["inputs"].values()
        )
    ]


def _maker(reader: Path, path: str) -> Path | None:
    maker = run_of(os.path.normpath(reader / path))
    return maker.resolve() if maker is not None else None


def _places(place: Path, begun: bool = False) -> Iterator[Path]:
    """Directories that hold a manifest of ours, or have only `begun`. What a run wrote into its own is not searched."""
    for directory, inner, files in os.walk(place):
        ours = MANIFEST in files and is_run(Path(directory))
        inner[:] = sorted(name for name in inner if not name.startswith(".") and not (ours and name in WRITTEN))
        if ours or (begun and STATUS in files and MANIFEST not in files and has_status(Path(directory))):
            yield Path(directory)


def _listed(run: Path) -> Listed:
    status = read_status(run) if has_status(run) else None
    if not is_run(run):
        assert status is not None, "what has neither is not listed"
        return Listed(str(run), run.resolve().name, status["state"], status["time"], None, {})
    manifest = read_manifest(run)
    finished = manifest["finished"] is not None
    state = "done" if finished else status["state"] if status else "unknown"
    return Listed(
        run=str(run),
        stage=manifest["stage"],
        state="killed" if state == "running" and _is_left(run) else state,
        started=manifest["started"],
        seconds=seconds(manifest) if finished else None,
        result=_key(manifest.get("result", {})),
    )


def _is_left(run: Path) -> bool:
    """Whether a run that says it is running is nobody's: no process of this machine, where it ran, holds it."""
    status = read_status(run)
    try:
        check_unlocked(run)
    except Locked:
        return False
    return status is not None and status["host"] == socket.gethostname()


def _key(result: dict[str, Any]) -> dict[str, float]:
    for name, inner in KEY_RESULTS:
        found = result.get(name)
        if inner is not None:
            found = found.get(inner) if isinstance(found, dict) else None
        if isinstance(found, int | float):
            return {f"{name} {inner}" if inner else name: found}
    return {}
