"""Writing large files a tensor at a time: laid out first, from names and shapes, then filled in any order.

Nothing is held but the tensor at hand, and a full disk is an error of `pwrite`, not a crash.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.checkpoints.pickles import Piece, write_metadata
from rlhf.checkpoints.plan import Entry, TargetFile
from rlhf.errors import DataError

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


CHUNK = 1 << 17
"""Bytes hashed and written at a time: they are in the processor's cache for the second."""


class Sink(Protocol):
    """A file that is being written."""

    def write(self, key: str, tensor: Tensor) -> str:
        """Puts the tensor in its place; the SHA-256 of its bytes."""
        ...

    def close(self) -> None:
        """What is written is on disk."""
        ...


def open_sink(directory: Path, file: TargetFile) -> Sink:
    """The file, laid out and empty."""
    path = directory / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.kind == "distcp":
        return _Distcp(path, file)
    offsets = _safetensors_layout(path, file) if file.kind == "safetensors" else _pt_layout(path, file)
    return _Placed(path, offsets, file.entries)


class _Placed:
    """A file whose tensors have their places."""

    def __init__(self, path: Path, offsets: Mapping[str, int], entries: Mapping[str, Entry]) -> None:
        self.path, self.offsets, self.entries = path, offsets, entries
        self.file = os.open(path, os.O_WRONLY)

    def write(self, key: str, tensor: Tensor) -> str:
        begin, planned = self.offsets[key], self.entries[key].bytes
        if tensor.nbytes != planned:  # one byte more would be the next tensor's
            raise DataError(f"{self.path}: {key}: {tensor.nbytes:,} bytes for a place of {planned:,}")
        digest, place = hashlib.sha256(), begin
        for chunk in _chunks(tensor.detach()):
            digest.update(chunk)
            written = 0
            while written < len(chunk):
                written += os.pwrite(self.file, chunk[written:], place + written)
            place += written
        # Begins to bring it to disk, so that the fsync at the end finds little left.
        os.posix_fadvise(self.file, begin, planned, os.POSIX_FADV_DONTNEED)
        return digest.hexdigest()

    def close(self) -> None:
        os.fsync(self.file)
        os.close(self.file)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in order. One that does not lie so is put in order a few rows at a time, always in the same memory:
    a copy of the whole would cost as much as writing it, most of that in pages touched for the first time."""
    if tensor.is_contiguous() or tensor[0].nbytes > CHUNK:
        content = _bytes(tensor)
        for begin in range(0, len(content), CHUNK):
            yield content[begin : begin + CHUNK]
        return
    buffer = torch.empty_like(tensor[: CHUNK // tensor[0].nbytes], memory_format=torch.contiguous_format)
    for rows in tensor.split(len(buffer)):
        yield _bytes(buffer[: len(rows)].copy_(rows))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _safetensors_layout(path: Path, file: TargetFile) -> dict[str, int]:
    """Source: https://github.com/huggingface/safetensors, README, Format: 8 bytes of length, a JSON header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, entry in file.entries.items():
        begin, end = end, end + entry.bytes
        header[key] = {"dtype": SAFETENSORS_DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    start = 8 + len(text)
    return {key: start + header[key]["data_offsets"][0] for key in file.entries}


def _pt_layout(path: Path, file: TargetFile) -> dict[str, int]:
    """torch.save with the bytes of tensors left out, and where it would have put them (torch.serialization.skip_data)."""
    content = dict(file.content)
    for key, entry in file.entries.items():
        *sections, last = key.split("/")
        section = content
        for name in sections:
            section = section.setdefault(name, {})
        # Never touched, so it takes no memory.
        section[last] = torch.empty(entry.shape, dtype=entry.dtype)
    with torch.serialization.skip_data():
        torch.save(content, path)
    # Storages are numbered as they are met; the archive's directory says where each begins.
    reader: Any = torch._C.PyTorchFileReader(str(path))
    numbers: dict[Any, int] = {}
    for tensor in _tensors(content):
        numbers.setdefault(tensor, len(numbers))
    offsets = {}
    for key in file.entries:
        found: Any = content
        for name in key.split("/"):
            found = found[name]
        offsets[key] = reader.get_record_offset(f"data/{numbers[found]}")
    return offsets


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors of nested dictionaries, in the order they are pickled."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors(value)


class _Distcp:
    """Pieces one after the other; `.metadata` beside them says which is where."""

    def __init__(self, path: Path, file: TargetFile) -> None:
        self.path, self.target = path, file
        self.stream = path.open("wb")
        self.lock = Lock()
        self.places: dict[str, tuple[int, int]] = {}
        for key, value in file.content.items():
            saved = io.BytesIO()
            torch.save(value, saved)
            self.places[key] = (self.stream.tell(), self.stream.write(saved.getbuffer()))

    def write(self, key: str, tensor: Tensor) -> str:
        piece = tensor.detach().reshape(self.target.entries[key].shape).contiguous()
        saved = io.BytesIO()
        torch.save(piece.clone() if piece.untyped_storage().nbytes() != piece.nbytes else piece, saved)
        with self.lock:
            begin = self.stream.tell()
            self.stream.write(saved.getbuffer())
            self.places[key] = (begin, self.stream.tell() - begin)
        return hashlib.sha256(_bytes(piece)).hexdigest()

    def close(self) -> None:
        pieces = []
        for key, (begin, length) in self.places.items():
            entry = self.target.entries.get(key)
            if entry is None:
                pieces.append(Piece(key, (), (), (), None, self.path.name, begin, length))
                continue
            pieces.append(Piece(*entry.where, entry.shape, entry.dtype, self.path.name, begin, length))
        write_metadata(self.path.parent / ".metadata", pieces)
        os.fsync(self.stream.fileno())
        self.stream.close()
