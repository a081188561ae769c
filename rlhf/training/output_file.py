"""A file that a command writes: one that is new, and appears complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from rlhf.data.rows import Row
from rlhf.errors import DataError, OutputError, StorageError


def require_new(file: str | Path) -> Path:
    """Asked before any work is done: the file is made, and removed again.

    Raises:
        OutputError: the file is there, its directory is not, or the system does not let it be made.
    """
    file = Path(file)
    if not os.path.isdir(file.parent):  # Path.is_dir raises for a name that is too long
        raise OutputError(f"{file}: there is no directory {file.parent}")
    try:
        file.touch(exist_ok=False)
        file.unlink()
    except FileExistsError:
        raise OutputError(f"{file}: is there already; name another file in --output, or remove it") from None
    except OSError as error:
        raise OutputError(f"{file}: cannot be made: {error.strerror}; name another file in --output") from None
    return file


def require_free(row: Row, columns: Collection[str], names: Iterable[str]) -> None:
    """Raises DataError where a column of the row has one of the names that are written beside it."""
    for name in names:
        if name in columns:
            raise DataError(f"{row.where}: has a column {name!r}, which is the name of one that is written; rename it")


def write(file: Path, text: str, over: bool = False) -> None:
    """
    Args:
        over: the file is one that this command has written before.

    Raises:
        OutputError: the file is there by now; the text is then beside it, under a name that is told.
        StorageError: it cannot be written; nothing is then left of it.
    """
    partial = file.with_name(f".rlhf-{os.getpid()}")  # the longest name that a file may have leaves no room for more
    try:
        partial.write_text(text, encoding="utf-8")
        file.touch(exist_ok=over)
        partial.replace(file)
    except FileExistsError:
        raise OutputError(f"{file}: has been made by something else meanwhile; the result is in {partial}") from None
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{file}: cannot be written: {error.strerror}") from error
