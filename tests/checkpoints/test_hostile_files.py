"""Files made to run code, to lead out of their directory, or broken: none executes, each is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.pickles import open_metadata
from rlhf.checkpoints.writing import write
from rlhf.cli import main
from rlhf.errors import DataError

WITNESS = "it-ran"


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    build("llama", home / "hf")
    write(plan(Request(home / "hf", home / "torch", "megatron")))
    write(plan(Request(home / "hf", home / "dist", "megatron", layout="torch_dist")))
    return home


def pt(root: Path) -> Path:
    return root / "release" / "mp_rank_00" / "model_optim_rng.pt"


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


def with_content(root: Path, change: dict) -> None:
    content = torch.load(pt(root), weights_only=False)
    for name, value in change.items():
        if name in content:
            content[name] = value
        else:
            setattr(content["args"], name, value)
    torch.save(content, pt(root))


def with_tensor(root: Path, tensor: torch.Tensor) -> None:
    content = torch.load(pt(root), weights_only=False)
    content["model"]["embedding.word_embeddings.weight"] = tensor
    torch.save(content, pt(root))


def compressed(file: Path) -> None:
    torch.save(torch.load(file, weights_only=False), file)
    with zipfile.ZipFile(file) as opened:
        items = {item.filename: opened.read(item) for item in opened.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in items.items():
            packed.writestr(name, content)


def patched(file: Path, begin: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(begin)
        stream.write(content)


CASES = {
    "pt runs os.system": (
        "torch",
        lambda root: torch.save({"model": Runs(os.system, f"touch {WITNESS}")}, pt(root)),
        "posix.system",
    ),
    "pt runs eval": ("torch", lambda root: torch.save({"args": Runs(eval, f"open('{WITNESS}', 'w')")}, pt(root)), "wants eval"),
    "pt opens a file": ("torch", lambda root: torch.save({"x": Runs(open, WITNESS, "w")}, pt(root)), "io.open"),
    "pt hides it in args": (
        "torch",
        lambda root: torch.save({"args": {"a": [Runs(os.mkdir, WITNESS)]}, "model": {}}, pt(root)),
        "mkdir",
    ),
    "pt is a plain pickle": (
        "torch",
        lambda root: pt(root).write_bytes(pickle.dumps({"a": Runs(os.mkdir, WITNESS)})),
        "model_optim",
    ),
    "pt imports a module": ("torch", lambda root: torch.save({"x": Runs(__import__, "this")}, pt(root)), "__import__"),
    "pt makes pointers of bytes": (
        "torch",
        lambda root: torch.save({"args": Runs(np.ndarray, (1,), "O", b"A" * 8), "model": {}}, pt(root)),
        "args is a ndarray, expected",
    ),
    **{
        f"args say {what}": ("torch", lambda root, change=change: with_content(root, change), message)
        for what, change, message in (
            ("nothing but text", {"args": "abc"}, "args is a str"),
            ("it in a dictionary", {"args": {"num_layers": 4}}, "args is a dict"),
            ("heads in text", {"num_attention_heads": "4"}, "args.num_attention_heads is '4', expected a whole number"),
            ("heads in fractions", {"num_attention_heads": 4.0}, "args.num_attention_heads is 4.0, expected a whole number"),
            ("experts in text", {"num_experts": "x"}, "args.num_experts is 'x'"),
            ("fewer than no layers", {"num_layers": -1}, "args.num_layers is -1"),
            ("an epsilon in text", {"norm_epsilon": "x"}, "args.norm_epsilon is 'x', expected a number"),
        )
    },
    "a version in text": ("torch", lambda root: with_content(root, {"checkpoint_version": "x"}), "checkpoint_version is 'x'"),
    "a model in a list": ("torch", lambda root: with_content(root, {"model": [1]}), "model is a list, expected tensors"),
    "a tracker of 5000 digits": (
        "torch",
        lambda root: (root / "latest_checkpointed_iteration.txt").write_text("9" * 5000),
        "expected the number of an iteration",
    ),
    "pt says a number is a matrix": (
        "torch",
        lambda root: with_tensor(root, torch.zeros(1).expand(1 << 30, 64)),
        r"would be 274,877,906,944 bytes, the file holds 4 of it",
    ),
    "pt holds a sparse tensor": ("torch", lambda root: with_tensor(root, torch.eye(4).to_sparse()), "torch.sparse_coo"),
    "pt holds complex numbers": (
        "torch",
        lambda root: with_tensor(root, torch.zeros(4, 4, dtype=torch.complex64)),
        "complex64; expected a dense tensor",
    ),
    "pt is compressed": ("torch", lambda root: compressed(pt(root)), "data.pkl in it is compressed"),
    "pt is empty": ("torch", lambda root: pt(root).write_bytes(b""), "model_optim_rng.pt"),
    "pt is text": ("torch", lambda root: pt(root).write_text("hello"), "model_optim_rng.pt"),
    "pt is cut short": ("torch", lambda root: os.truncate(pt(root), pt(root).stat().st_size // 2), "is it complete"),
    "pt is a list": ("torch", lambda root: torch.save([1, 2], pt(root)), "holds a list"),
    "pt has no model": ("torch", lambda root: torch.save({"iteration": 1}, pt(root)), "model_optim_rng.pt|release"),
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
        for named in (
            "pathlib PosixPath",
            "torch.distributed.checkpoint.metadata Metadata",
            "torch.serialization _get_layout",
            "collections OrderedDict",
            "torch Size",
            "torch float32",
        )
        for how, state, message in (("slots", SLOTS, r"\.metadata: "), ("its dictionary", ATTRIBUTES, r"\.metadata: "))
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
    "safetensors is cut short": ("hf", lambda root: os.truncate(root / "model.safetensors", 5000), "is it complete"),
    "safetensors has a wild header": (
        "hf",
        lambda root: patched(root / "model.safetensors", 0, (1 << 60).to_bytes(8, "little")),
        "model.safetensors",
    ),
    "an index leads out": (
        "hf",
        lambda root: (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret"}})),
        "leads out of the directory",
    ),
    "an index is no index": ("hf", lambda root: (root / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "bin runs os.system": (
        "hf",
        lambda root: (
            (root / "model.safetensors").unlink(),
            torch.save({"a": Runs(os.system, f"touch {WITNESS}")}, root / "pytorch_model.bin"),
        ),
        "posix.system",
    ),
    **{
        f"config has {key} {value!r}": (
            "hf",
            lambda root, change={key: value}: (root / "config.json").write_text(
                json.dumps({**json.loads((root / "config.json").read_text()), **change})
            ),
            rf"config\.json: {key} is .*, expected",
        )
        for key, value in (("rope_parameters", 5), ("vocab_size", "100"), ("num_hidden_layers", -1), ("hidden_size", 64.5))
    },
    "an index with a number": (
        "hf",
        lambda root: (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 5}})),
        "not an index of weights",
    ),
    "config is no json": ("hf", lambda root: (root / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused(name, home, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    kind, damage, message = CASES[name]
    root = Path(shutil.copytree(home / kind, tmp_path / "source"))
    damage(root)
    code = main(["convert", str(root), "out", "--to", "hf" if kind != "hf" else "megatron"])
    said = capsys.readouterr().err.strip()
    assert code == 65, said
    assert len(said.splitlines()) == 1, said
    assert said.startswith("rlhf: error: ")
    assert "weights_only" not in said, "torch's advice is to run it"
    assert re.search(message, said), said
    assert not Path(WITNESS).exists()
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


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


def test_the_witness_would_be_there(tmp_path, monkeypatch) -> None:
    """The negative control: opened without care, such a file does run."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs(os.mkdir, WITNESS)))
    assert Path(WITNESS).exists()


def test_an_untouched_copy_converts(home, tmp_path) -> None:
    for kind in ("torch", "dist"):
        write(plan(Request(home / kind, tmp_path / kind, "hf")))
        first, second = load_file(tmp_path / kind / "model.safetensors"), load_file(home / "hf" / "model.safetensors")
        assert all(torch.equal(first[key], second[key]) for key in second)
