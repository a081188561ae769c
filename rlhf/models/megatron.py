"""Megatron checkpoints as a model source: converted once into a Hugging Face directory in the cache, and proven."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.directory import iteration_directory
from rlhf.checkpoints.writing import write
from rlhf.digest import cache_directory, text_digest, tree_digest
from rlhf.errors import CheckFailed, DataError


def converted(path: Path) -> Path:
    """The Hugging Face directory of a Megatron checkpoint; made on first use, kept by the digest of what it was made from.

    Raises:
        DataError: the checkpoint cannot be converted, or the result does not compute what its source does.
    """
    beside = [file.read_text(errors="replace") for file in sorted(path.glob("*.json"))]
    target = cache_directory() / "megatron" / text_digest("\n".join([tree_digest(iteration_directory(path)), *beside]))[:16]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # several processes of one run ask at once
        if not target.is_dir():
            _convert(path, target)
    return target


def _convert(path: Path, target: Path) -> None:
    from rlhf.checkpoints.verify import verify

    conversion = plan(Request(path, target, "hf"))
    write(conversion)
    try:
        verify(conversion)
    except CheckFailed as error:
        shutil.rmtree(target)
        raise DataError(f"{path}: converted, but {error}; `rlhf convert --verify` shows more") from error
