"""Training checkpoints that a kill cannot spoil.

    RUN/checkpoints/step-N/   NAME.safetensors, state.json, MANIFEST.json

A checkpoint is written under another name, synced, described by a manifest with the size and SHA-256 of every file, verified,
and only then renamed; older ones go last. There is no pointer file: the latest checkpoint is the one with the highest step that
verifies. One that does not is renamed `*.corrupt`, said, and passed over. Files are renamed and removed, never written again
in place: who has mapped one keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.digest import text_digest
from rlhf.errors import DataError, StorageError
from rlhf.paths import sync
from rlhf.runs.manifest import write_json

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
REPLACED = ".replaced-"
"""Before the name of a checkpoint that gives way to another of the same step, for the moment when neither has that name."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `step` steps were done."""

    directory: Path
    step: int
    why: str = ""
    """How it was chosen, in words."""

    def tensors(self, name: str, optional: bool = False) -> dict[str, Tensor]:
        """Of the file of that name; if it is `optional`, none where the run had nothing to put there."""
        path = self.directory / f"{name}.safetensors"
        return {} if optional and not path.exists() else load_file(path)

    def state(self) -> dict[str, Any]:
        return json.loads((self.directory / STATE).read_text(encoding="utf-8"))


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int) -> Path:
    """Commits a checkpoint and rotates older ones away.

    Args:
        tensors: one safetensors file by each name.
        state: JSON; floats keep every bit (repr round-trips).
        keep: how many of the newest to keep.

    Raises:
        StorageError: the disk is full or failed; checkpoints already there are untouched.
    """
    final, partial = root / f"step-{step}", root / f".tmp-step-{step}-{os.getpid()}"
    replaced = root / f"{REPLACED}{final.name}"
    try:
        partial.mkdir(parents=True)
        for name, values in tensors.items():
            # A view of a larger storage or a shared tensor would be refused or saved whole.
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in values.items()},
                partial / f"{name}.safetensors",
            )
        write_json(partial / STATE, state)
        files = sorted(path for path in partial.iterdir())
        for path in files:
            sync(path)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "files": {path.name: _described(path) for path in files},
        }
        write_json(partial / MANIFEST, {**manifest, "digest": text_digest(json.dumps(manifest, sort_keys=True))})
        sync(partial)
        if fault := verify(partial, step):
            raise OSError(f"it does not read back as written: {fault}")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(root)
        sync(root.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"{final}: the checkpoint could not be written ({error}); older checkpoints are untouched"
        ) from error
    # what cannot be removed any more is in nobody's way, and the next start tries again
    shutil.rmtree(replaced, ignore_errors=True)
    for old in _numbered(root)[keep:]:
        _remove(old[1])
    return final


def require_room(root: Path, checkpoint_bytes: int, count: int, result_bytes: int) -> None:
    """Raises StorageError where the disk has no room for what a run is sure to write.

    Args:
        count: checkpoints that will be there at once; those that are there already are in place.
    """
    missing = max(0, count - len(_numbered(root)))
    needed, free = missing * checkpoint_bytes + result_bytes, shutil.disk_usage(root.parent).free
    if needed > free:
        raise StorageError(
            f"{root.parent}: {needed:,} bytes are needed ({missing} checkpoints of {checkpoint_bytes:,}, and the result), "
            f"{free:,} are free; make room, or lower checkpoint.keep"
        )


def latest(root: Path, say: Callable[[str], None], named: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies; leftovers of a kill are cleared away.

    Args:
        named: the step that the user wants to go on from; it must be that of the newest.

    Raises:
        DataError: there are checkpoints and none verifies, since starting over silently would lose the run; or the newest is
            not the one that was named.
    """
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for replaced in root.glob(f"{REPLACED}*"):
        original = root / replaced.name.removeprefix(REPLACED)
        if original.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(original)
    found = _numbered(root)
    for step, directory in found:
        fault = verify(directory, step)
        if not fault:
            if named is not None and named != step:
                raise DataError(
                    f"step-{named} was named to go on from, and {directory} is the newest that verifies; "
                    f"name the run alone, or, if step-{named} is whole, move what is newer out of {root}"
                )
            names = ", ".join(path.name for _, path in found)
            return Checkpoint(directory, step, f"of {names}, the highest step that verifies")
        aside = directory.with_name(f"{directory.name}.corrupt")
        if aside.exists():
            shutil.rmtree(aside)
        directory.rename(aside)
        say(f"{directory} is corrupt ({fault}); kept as {aside.name} and passed over")
    if found or named is not None or any(root.glob("*.corrupt")):
        raise DataError(f"{root}: no checkpoint verifies; remove the directory to start over, or restore one")
    return None


def at(root: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, as another rank found it.

    Raises:
        DataError: here it does not verify.
    """
    directory = root / f"step-{step}"
    if fault := verify(directory, step):
        raise DataError(f"{directory}: rank 0 reads it and this rank does not ({fault}); is --output one and the same for all?")
    return Checkpoint(directory, step)


def verify(directory: Path, step: int) -> str:
    """What is wrong with the checkpoint of that step in the directory, or an empty string."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("digest")
        files, written_at = manifest["files"], manifest["step"]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:  # any other is the disk's, not the checkpoint's
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    if digest != text_digest(json.dumps(manifest, sort_keys=True)) or written_at != step:
        return f"{MANIFEST} is not the one written with it"
    present = {path.name for path in directory.iterdir()} - {MANIFEST}
    if present != set(files):
        return f"files {sorted(present ^ set(files))} are missing or new"
    for name, expected in files.items():
        if not (directory / name).is_file() or _described(directory / name) != expected:
            return f"{name} has changed"
    return ""


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """(step, directory), newest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name))]
    return sorted(found, reverse=True)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _remove(directory: Path) -> None:
    """Renamed first, so that a kill leaves a leftover and not half a checkpoint."""
    aside = directory.with_name(f".tmp-delete-{directory.name}")
    directory.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
