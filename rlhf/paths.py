"""Where the recipes and their configs lie (inside the package once installed, beside it in a checkout); what is on disk."""

from __future__ import annotations

import glob
import os
import re
import shutil
import socket
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
STAGES = next(path for path in (PACKAGE / "_stages", PACKAGE.parent / "stages") if path.is_dir())
CONFIGS = next(path for path in (PACKAGE / "_configs", PACKAGE.parent / "configs") if path.is_dir())


def sync(path: Path) -> None:
    """What the file holds, or which names the directory has, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """All of it is on disk, names included: renamed after this, the directory is complete under its new name, or not there."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def beside(destination: Path) -> Path:
    """A name beside the destination for what is written before it is renamed; what killed processes left there is removed.

    With the host's name: on a disk that several share, another's process of that number may well be alive.
    """
    import psutil  # who writes nothing need not import it

    begun_here = f".{destination.name}-{socket.gethostname()[:40]}-"
    for left in destination.parent.glob(f"{glob.escape(begun_here)}*"):
        process = re.fullmatch(r"(\d+)[.](partial|replaced)", left.name.removeprefix(begun_here))
        if process and not psutil.pid_exists(int(process[1])):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return destination.with_name(f"{begun_here}{os.getpid()}.partial")


def shipped_or_own(named: str) -> Path | None:
    """A file by its path from here or, where there is none, the shipped one of that name (`configs/...`); None: neither."""
    here, shipped = Path(named), CONFIGS / Path(*Path(named).parts[1:])
    return next((file for file in (here, shipped) if file.is_file()), None)
