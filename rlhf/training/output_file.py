"""A file that a command writes: one that is new, and appears complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.errors import OutputError, StorageError


def require_new(file: str | Path) -> Path:
    """Asked before any work is done. Raises OutputError where the file is there, or its directory is not."""
    file = Path(file)
    if file.exists():
        raise OutputError(f"{file}: is there already; name another file in --output, or remove it")
    if not file.parent.is_dir():
        raise OutputError(f"{file}: there is no directory {file.parent}")
    return file


def write(file: Path, text: str) -> None:
    """Raises StorageError where it cannot be written; nothing is then left of it."""
    partial = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{file}: cannot be written: {error.strerror}") from error
