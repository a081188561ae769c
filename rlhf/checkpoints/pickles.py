"""Opening what other programs pickled, without running anything of theirs.

torch's weights-only unpickler builds tensors and what is on its allow list; Megatron's own classes, of which only the values in
`args` are of use, become empty stand-ins. A name on neither list ends the reading. There is no other way in.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import types
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.errors import DataError

UnpicklingError = pickle.UnpicklingError

STAND_INS = (
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "signal.Signals",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
)
"""What is named in `args` and beside it, by the versions of Megatron-LM from 0.12 to 0.16: none of it is of use.

numpy's are the random states; an array of Python objects made of bytes would be pointers of the file's choice.
"""


class _StandIn:
    """Takes the place of an object of a foreign class; holds nothing."""

    def __new__(cls, *arguments: object) -> _StandIn:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *((type(name.rpartition(".")[2], (_StandIn,), {}), name) for name in STAND_INS),
]


def open_pt(path: Path) -> dict[str, Any]:
    """The content of a .pt file; its tensors stay in the file and are paged in as they are read.

    Raises:
        DataError: it is no .pt file, is cut short, or holds something outside the allow list (the message names it).
    """
    try:
        _stored_as_it_is(path)
        with torch.serialization.safe_globals(ALLOWED):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused, nothing of it was run: {forbidden(str(error))}") from None
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{path}: not a readable .pt file: {reason}; is it complete?") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected the dictionary of a checkpoint")
    return content


def open_tensor(path: Path, offset: int, length: int) -> Tensor:
    """A tensor saved by torch.save at this place of a larger file.

    Raises:
        DataError: the file ends before it does, or it is something else than a tensor.
    """
    try:
        with path.open("rb") as stream:
            end = os.fstat(stream.fileno()).st_size
            if end < offset + length:
                raise DataError(f"{path}: ends at byte {end}, expected at least {offset + length}; is it complete?")
            stream.seek(offset)
            saved = stream.read(length)
        _stored_as_it_is(io.BytesIO(saved))
        tensor = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused, nothing of it was run: {forbidden(str(error))}") from None
    except (RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: no readable tensor at byte {offset}: {str(error).splitlines()[0]}") from error
    if not isinstance(tensor, Tensor):
        raise DataError(f"{path}: holds a {type(tensor).__name__} at byte {offset}, expected a tensor")
    if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise DataError(f"{path}: the tensor at byte {offset} says it is larger than what is stored of it")
    return tensor


def _stored_as_it_is(archive: Path | io.BytesIO) -> None:
    """torch.save compresses nothing; a small file that grows without end when it is opened was written by something else."""
    try:
        with zipfile.ZipFile(archive) as opened:
            packed = next((item.filename for item in opened.infolist() if item.compress_type != zipfile.ZIP_STORED), None)
    except zipfile.BadZipFile:
        return  # torch says it better
    if packed:
        raise ValueError(f"{packed} in it is compressed, which torch.save never does")


METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties StorageMeta "
        "_MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
}
"""What a .metadata file of torch.distributed.checkpoint may name (torch 2.4 to 2.13); each is a `Record` to us."""
DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool"
PLAIN_TYPES: dict[tuple[str, str], type] = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}


class _Sealed(type):
    """A class that a file cannot change: pickle's BUILD sets attributes on whatever lies on its stack, classes included."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it changes the class {cls.__name__}")


class Record(metaclass=_Sealed):
    """Takes the place of an object of a .metadata file: the name of its class, and its state as it was pickled."""

    state: Any = None

    def __new__(cls, *arguments: object) -> Record:
        return object.__new__(cls)

    def __setstate__(self, *state: object) -> None:
        if not state:  # BUILD on the class itself: the state came in the place of the object
            raise pickle.UnpicklingError("it changes a class")
        self.state = state[0]


RECORDS = {(module, name): _Sealed(name, (Record,), {}) for module, known in METADATA_CLASSES.items() for name in known.split()}


class _MetadataUnpickler(pickle.Unpickler):
    """Hands out `Record`s, dtypes, and two built-in types, which cannot be changed: no class of anybody's, no function."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES.split():
            return getattr(torch, name)
        found = RECORDS.get((module, name)) or PLAIN_TYPES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return found


def open_metadata(path: Path) -> Any:
    """What torch.distributed.checkpoint pickled about a directory of .distcp files; layouts/metadata.py says what it must be.

    Raises:
        DataError: the file is missing, cut short, or names a class that has no place in it.
    """
    try:
        with path.open("rb") as stream:
            return _MetadataUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused, nothing of it was run: {forbidden(str(error))}") from None
    except (
        *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError),
        *(IndexError, ImportError, MemoryError, OverflowError, RecursionError, RuntimeError),
    ) as error:
        raise DataError(f"{path}: not the metadata of a distributed checkpoint: {str(error) or 'it ends early'}") from error


class Piece(NamedTuple):
    """A piece of a tensor in a .distcp file."""

    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    """of the whole tensor"""
    shape: tuple[int, ...]
    """of the piece"""
    dtype: torch.dtype | None
    """None: no tensor, but what torch.save wrote of something else"""
    file: str
    begin: int
    length: int


def write_metadata(path: Path, pieces: Iterable[Piece]) -> None:
    """What layouts/metadata.py and torch.distributed.checkpoint read."""
    from torch.distributed.checkpoint import filesystem, metadata

    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for piece in pieces:
        if piece.dtype is None:
            tensors[piece.key] = metadata.BytesStorageMetadata()
            places[metadata.MetadataIndex(piece.key)] = filesystem._StorageInfo(piece.file, piece.begin, piece.length)
            continue
        about = metadata.TensorStorageMetadata(metadata.TensorProperties(piece.dtype), torch.Size(piece.size), [])
        chunk = metadata.ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
        tensors.setdefault(piece.key, about).chunks.append(chunk)
        index = metadata.MetadataIndex(piece.key, torch.Size(piece.offset))
        places[index] = filesystem._StorageInfo(piece.file, piece.begin, piece.length)
    with path.open("wb") as stream:
        pickle.dump(
            metadata.Metadata(tensors, storage_data=places, storage_meta=metadata.StorageMeta(), version="1.0.0"), stream
        )
        os.fsync(stream.fileno())


def forbidden(message: str) -> str:
    """What a pickle asked for that was refused, in our words: torch's own advise to run it."""
    named = re.search(r"GLOBAL ([\w.]+)|`?([\w.]+)`? (?:was|is) not an allowed", message)
    if named:
        return f"it wants {named[1] or named[2]}, which no checkpoint of a known tool needs"
    if message.startswith("it changes"):
        return f"{message}, which no checkpoint of a known tool does"
    return "it is no pickle of plain values and tensors; is it complete, and written by a known tool?"
