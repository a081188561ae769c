"""What a directory must look like to be a Megatron checkpoint; decided from names alone, without torch."""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import DataError

TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "mp_rank_*/model*.pt", "*.distcp")
"""Files of weights, of whatever format; where there are several kinds, the first is read."""


def is_torch(directory: Path) -> bool:
    """One iteration in the layout `torch`: a file for each rank."""
    return any(directory.glob("mp_rank_*"))


def is_torch_dist(directory: Path) -> bool:
    """One iteration in the layout `torch_dist`: pieces of whole tensors."""
    return (directory / ".metadata").is_file() or any(directory.glob("*.distcp"))


def is_megatron(path: Path) -> bool:
    """Whether this is a Megatron checkpoint, its root or one iteration of it."""
    return (path / TRACKER).is_file() or is_torch(path) or is_torch_dist(path)


def iteration_directory(path: Path) -> Path:
    """The directory that holds the weights: the one the tracker file names, or `path` itself.

    Raises:
        DataError: the tracker file names none that is there.
    """
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit() and len(text) < 19):
        raise DataError(f"{tracker}: says {text[:40]!r}, expected the number of an iteration or `release`")
    directory = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory, though {tracker} names it")
    return directory


def weight_files(path: Path) -> list[Path]:
    """What will be read of a checkpoint of any format, as far as names tell."""
    directory = iteration_directory(path)
    found = ([file for file in sorted(directory.glob(pattern)) if file.is_file()] for pattern in WEIGHTS)
    return next((files for files in found if files), [])
