"""A .metadata file is a pickle of anybody's: it changes no class, runs nothing, and what it says is checked field by field."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hostile import WITNESS, Case, Runs, refused
from safetensors.torch import load_file
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.pickles import open_metadata
from rlhf.checkpoints.writing import write
from rlhf.errors import DataError


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    build("llama", home / "hf")
    write(plan(Request(home / "hf", home / "dist", "megatron", layout="torch_dist")))
    return home


def metadata(root: Path) -> Path:
    return root / "iter_0000000" / ".metadata"


def distcp(root: Path) -> Path:
    return root / "iter_0000000" / "__0_0.distcp"


def with_places(root: Path, change) -> None:
    content = pickle.loads(metadata(root).read_bytes())
    for place in content.storage_data.values():
        change(place)
    metadata(root).write_bytes(pickle.dumps(content))


def before_all(root: Path, opcodes: bytes) -> None:
    """Puts a pickle's opcodes in front of the file's own; what they leave on the stack they pop."""
    content = pickle.loads(metadata(root).read_bytes())
    metadata(root).write_bytes(b"\x80\x02" + opcodes + b"0" + pickle.dumps(content, protocol=2)[2:])


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()


def changes(named: str, state: bytes) -> bytes:
    """BUILD on what GLOBAL hands out, a class or a function, instead of on an object."""
    return b"c" + named.encode() + b"\n" + state + b"b"


SLOTS = b"N}" + text("__truediv__") + b"Ns\x86"
"""The state (None, {"__truediv__": None}): BUILD calls setattr for what is in the second."""
ATTRIBUTES = b"}" + text("__truediv__") + b"Ns"


def unread(root: Path, file: str) -> None:
    """One more item, of the optimizer, that a conversion has no use for."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    content = pickle.loads(metadata(root).read_bytes())
    content.state_dict_metadata["optimizer.x"] = BytesStorageMetadata()
    content.storage_data[MetadataIndex("optimizer.x")] = _StorageInfo(file, 0, 1)
    metadata(root).write_bytes(pickle.dumps(content))


def with_metadata(root: Path, change) -> None:
    content = pickle.loads(metadata(root).read_bytes())
    change(content)
    metadata(root).write_bytes(pickle.dumps(content))


def with_wholes(root: Path, change) -> None:
    with_metadata(
        root,
        lambda content: [change(whole) for whole in content.state_dict_metadata.values() if hasattr(whole, "chunks")],
    )


CASES: dict[str, Case] = {
    "metadata runs os.system": (
        "dist",
        lambda root: metadata(root).write_bytes(pickle.dumps(Runs(os.system, f"touch {WITNESS}"))),
        "posix.system",
    ),
    "metadata names torch.load": (
        "dist",
        lambda root: metadata(root).write_bytes(pickle.dumps(torch.load)),
        "torch.serialization.load",
    ),
    "metadata is a dictionary": ("dist", lambda root: metadata(root).write_bytes(pickle.dumps({"a": 1})), "metadata"),
    "metadata is cut short": ("dist", lambda root: os.truncate(metadata(root), 100), "metadata"),
    "metadata is missing": ("dist", lambda root: metadata(root).unlink(), r"\.metadata"),
    "metadata leads out": (
        "dist",
        lambda root: with_places(root, lambda place: setattr(place, "relative_path", "../../../etc/passwd")),
        "leads out of the directory",
    ),
    **{
        f"metadata changes {named} through {how}": (
            "dist",
            lambda root, named=named, state=state: before_all(root, changes(named.replace(" ", "\n"), state)),
            message,
        )
        for named, message in (
            ("pathlib PosixPath", "it changes a class, which no checkpoint"),
            ("torch.distributed.checkpoint.metadata Metadata", "it changes a class, which no checkpoint"),
            ("torch.serialization _get_layout", "it changes a class, which no checkpoint"),
            ("collections OrderedDict", r"\.metadata: "),
            ("torch Size", r"\.metadata: "),
            ("torch float32", r"\.metadata: "),
        )
        for how, state in (("slots", SLOTS), ("its dictionary", ATTRIBUTES))
    },
    **{
        f"metadata abuses {how}": ("dist", lambda root, opcodes=opcodes: before_all(root, opcodes), r"\.metadata: ")
        for how, opcodes in {
            "SETITEM on a class": b"cpathlib\nPosixPath\n" + text("a") + b"Ns",
            "SETITEM on a function": b"ctorch.serialization\n_get_layout\n" + text("a") + b"Ns",
            "APPEND on a class": b"cpathlib\nPosixPath\nNa",
            "APPENDS on an object": b"cpathlib\nPosixPath\n)R(Ne",
            "REDUCE of what is no class": b"ctorch\nfloat32\n)R",
            "NEWOBJ with arguments of no size": b"ctorch\nSize\nK\x05\x85\x81",
            "INST of another module": b"(" + text(f"touch {WITNESS}") + b"ios\nsystem\n",
            "OBJ of what is no class": b"(ctorch\nfloat32\n" + text("a") + b"o",
            "a dotted name": b"\x80\x04" + text("pathlib") + text("PosixPath.__init__") + b"\x93",
            "an extension": b"\x82\x01",
            "a persistent id": b"Pabc\n",
            "a memo that is not there": b"h\x99",
            "a length without end": b"\x8d" + (1 << 60).to_bytes(8, "little"),
        }.items()
    },
    "metadata leads out for what is not read": ("dist", lambda root: unread(root, "/dev/zero"), "optimizer.x.*leads out"),
    "metadata has a wild length": (
        "dist",
        lambda root: with_places(root, lambda place: setattr(place, "length", 10**15)),
        "is it complete",
    ),
    "metadata lies about a type": (
        "dist",
        lambda root: with_wholes(root, lambda whole: setattr(whole.properties, "dtype", torch.float64)),
        "metadata says .*float64",
    ),
    **{
        f"metadata holds {what}": ("dist", damage, r"\.metadata: not the metadata of a distributed checkpoint: ")
        for what, damage in {
            "a list of places": lambda root: with_metadata(root, lambda content: setattr(content, "storage_data", [1])),
            "places of nothing": lambda root: with_metadata(root, lambda content: setattr(content, "storage_data", {"a": 1})),
            "no tensors": lambda root: with_metadata(root, lambda content: setattr(content, "state_dict_metadata", None)),
            "numbers for names": lambda root: with_metadata(
                root,
                lambda content: setattr(content, "state_dict_metadata", dict(enumerate(content.state_dict_metadata.values()))),
            ),
            "a number for a file": lambda root: with_places(root, lambda place: setattr(place, "relative_path", 5)),
            "a tensor without axes": lambda root: with_wholes(root, lambda whole: setattr(whole, "size", torch.Size([]))),
            "a tensor without properties": lambda root: with_wholes(root, lambda whole: setattr(whole, "properties", None)),
        }.items()
    },
    "metadata has a wild size": (
        "dist",
        lambda root: with_wholes(root, lambda whole: setattr(whole, "size", torch.Size([10**12, *whole.size[1:]]))),
        r"\.metadata: .*",
    ),
    "distcp is cut short": ("dist", lambda root: os.truncate(distcp(root), 1000), "is it complete"),
    "distcp is missing": ("dist", lambda root: distcp(root).unlink(), "__0_0.distcp"),
    "distcp holds code": (
        "dist",
        lambda root: (
            torch.save(Runs(os.system, f"touch {WITNESS}"), distcp(root)),
            with_places(
                root,
                lambda place: (setattr(place, "offset", 0), setattr(place, "length", distcp(root).stat().st_size)),
            ),
        ),
        "posix.system",
    ),
    "distcp holds another tensor": (
        "dist",
        lambda root: (
            torch.save(torch.zeros(3), distcp(root)),
            with_places(
                root,
                lambda place: (setattr(place, "offset", 0), setattr(place, "length", distcp(root).stat().st_size)),
            ),
        ),
        r"holds \(3,\)",
    ),
    "common.pt runs os.system": (
        "dist",
        lambda root: torch.save({"args": Runs(os.system, f"touch {WITNESS}")}, root / "iter_0000000" / "common.pt"),
        "posix.system",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused(name, home, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    refused(CASES[name], home, tmp_path, capsys)


def test_a_class_of_python_is_as_it_was(home, tmp_path, monkeypatch) -> None:
    """What the files above do not change; the negative control: opened without care, such a file does change it."""
    root = Path(shutil.copytree(home / "dist", tmp_path / "source"))
    before_all(root, changes("tiny\nMarked", b"N}" + text("mark") + b"Ns\x86"))
    with pytest.raises(DataError, match=r"tiny\.Marked"):
        open_metadata(metadata(root))
    assert Path("a") / "b" == Path("a/b")
    marked = type("Marked", (), {})
    monkeypatch.setattr(tiny, "Marked", marked, raising=False)
    pickle.loads(metadata(root).read_bytes())
    assert vars(marked)["mark"] is None


def test_a_lost_shard_of_the_optimizer_is_not_missed(home, tmp_path) -> None:
    root = Path(shutil.copytree(home / "dist", tmp_path / "source"))
    unread(root, "__1_0.distcp")
    write(plan(Request(root, tmp_path / "out", "hf")))
    files = json.loads((tmp_path / "out" / "conversion.json").read_text())["source_files"]
    assert {Path(file).name for file in files} == {".metadata", "common.pt", "__0_0.distcp"}


def test_an_untouched_copy_converts(home, tmp_path) -> None:
    write(plan(Request(home / "dist", tmp_path / "out", "hf")))
    first, second = load_file(tmp_path / "out" / "model.safetensors"), load_file(home / "hf" / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in second)
