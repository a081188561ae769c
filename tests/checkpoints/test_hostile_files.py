"""Files made to run code, to lead out of their directory, or broken: none executes, each is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.writing import write
from rlhf.cli import main

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
    import re

    assert re.search(message, said), said
    assert not Path(WITNESS).exists()
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


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
