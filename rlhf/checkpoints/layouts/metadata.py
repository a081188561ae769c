"""What a .metadata file says: every tensor over all ranks, and in which file each of its pieces lies.

The file is anybody's: what it unpickles to is checked here, field by field, before anything is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.checkpoints.pickles import Record, open_metadata
from rlhf.errors import DataError

Index = tuple[int, ...]
"""Where something begins, or how long it is, along every axis."""


class Place(NamedTuple):
    """Where a piece lies: a file of the same directory."""

    file: str
    begin: int
    length: int


class Whole(NamedTuple):
    """A tensor over all ranks."""

    size: Index
    dtype: torch.dtype
    chunks: tuple[tuple[Index, Index], ...]
    """(offset, shape) of each piece"""


@dataclass(frozen=True)
class Metadata:
    """All that is of use to a reader."""

    tensors: dict[str, Whole | None]
    """None: no tensor, but what torch.save wrote of something else."""
    places: dict[str, dict[Index, Place]]
    """By the tensor's key and the piece's offset."""


def read_metadata(path: Path) -> Metadata:
    """Of a directory of .distcp files.

    Raises:
        DataError: the file is missing, cut short, or says what cannot be.
    """
    try:
        about = _fields(open_metadata(path), "Metadata")
        tensors = {_text(key): _whole(_text(key), value) for key, value in _mapping(about["state_dict_metadata"]).items()}
        places: dict[str, dict[Index, Place]] = {}
        for index, value in _mapping(about["storage_data"]).items():
            found = _fields(index, "MetadataIndex")
            key = _text(found["fqn"])
            places.setdefault(key, {})[_index(found.get("offset") or ())] = _place(path, key, value)
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not the metadata of a distributed checkpoint: {what}") from None
    return Metadata(tensors, places)


def _whole(key: str, value: object) -> Whole | None:
    if type(value).__name__ == "BytesStorageMetadata":
        return None
    found = _fields(value, "TensorStorageMetadata")
    size = _index(found["size"])
    properties = found["properties"]
    dtype = properties.state[0] if isinstance(properties, Record) and isinstance(properties.state, tuple) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{key} has no dtype")
    chunks = []
    for chunk in found["chunks"] if isinstance(found["chunks"], list) else [None]:
        fields = _fields(chunk, "ChunkStorageMetadata")
        offset, shape = _index(fields["offsets"]), _index(fields["sizes"])
        if not len(offset) == len(shape) == len(size):
            raise ValueError(f"{key} has {len(size)} axes, a piece of it {len(offset)}")
        chunks.append((offset, shape))
    return Whole(size, dtype, tuple(chunks))


def _place(path: Path, key: str, value: object) -> Place:
    found = _fields(value, "_StorageInfo")
    file = _text(found["relative_path"])
    if file in ("", ".", "..") or "/" in file or "\0" in file:
        raise DataError(f"{path}: {key}: {file!r} leads out of the directory")
    begin, length = _index((found["offset"], found["length"]))
    return Place(file, begin, length)


def _fields(value: object, expected: str) -> dict[str, Any]:
    if not isinstance(value, Record) or type(value).__name__ != expected or not isinstance(value.state, dict):
        raise TypeError(f"holds a {type(value).__name__} where {expected} belongs")
    return value.state


def _mapping(value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"holds a {type(value).__name__} where a dictionary belongs")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"holds a {type(value).__name__} where a name belongs")
    return value


def _index(value: object) -> Index:
    if not isinstance(value, tuple) or not all(type(number) is int and 0 <= number < 1 << 63 for number in value):
        raise TypeError(f"holds {type(value).__name__} where sizes or offsets belong")
    return value
