"""Files made to run code, to lead out of their directory, or broken: none executes, each is refused in one line."""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import WITNESS, Case, Runs, refused
from safetensors.torch import load_file
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.writing import write


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    build("llama", home / "hf")
    write(plan(Request(home / "hf", home / "torch", "megatron")))
    return home


def pt(root: Path) -> Path:
    return root / "release" / "mp_rank_00" / "model_optim_rng.pt"


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


def bomb(file: Path) -> None:
    """200 MB of zeros in 200 kB."""
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("model_optim_rng/data/999", bytes(200 << 20))


def tar_of(file: Path) -> None:
    """As torch 0.1 saved, with a member that leads out."""
    with tarfile.open(file, "w") as packed:
        member = tarfile.TarInfo(f"../{WITNESS}")
        member.size = 4
        packed.addfile(member, io.BytesIO(b"gone"))


def long_header(file: Path) -> None:
    header = b'{"__metadata__":{"a":"' + b"x" * (101 << 20) + b'"}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header)


CASES: dict[str, Case] = {
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
            ("a switch in tensors", {"swiglu": torch.zeros(2)}, "args.swiglu is a tensor, expected a plain value"),
            ("experts every 0 layers", {"moe_layer_freq": 0}, "args.moe_layer_freq is 0, expected"),
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
    "safetensors is cut short": ("hf", lambda root: os.truncate(root / "model.safetensors", 5000), "is it complete"),
    "safetensors has a wild header": (
        "hf",
        lambda root: patched(root / "model.safetensors", 0, (1 << 60).to_bytes(8, "little")),
        "model.safetensors",
    ),
    "pt is a bomb of zeros": ("torch", lambda root: bomb(pt(root)), "data/999 in it is compressed"),
    "pt is a tar": ("torch", lambda root: tar_of(pt(root)), "model_optim_rng.pt"),
    "pt is TorchScript": (
        "torch",
        lambda root: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), pt(root)),
        "model_optim_rng.pt",
    ),
    "pt names a class through STACK_GLOBAL": (
        "torch",
        lambda root: torch.save({"x": Runs(shutil.rmtree, WITNESS)}, pt(root), pickle_protocol=4),
        "refused, nothing of it was run",
    ),
    "pt registers with copyreg": (
        "torch",
        lambda root: torch.save({"x": Runs(copyreg.pickle, dict, dict)}, pt(root)),
        "copyreg",
    ),
    "pt imports through torch.hub": (
        "torch",
        lambda root: torch.save({"x": Runs(torch.hub.load, WITNESS, "model")}, pt(root)),
        "torch.hub.load",
    ),
    "pt is a legacy file": (
        "torch",
        lambda root: torch.save({"x": Runs(os.mkdir, WITNESS)}, pt(root), _use_new_zipfile_serialization=False),
        "model_optim_rng.pt",
    ),
    "safetensors has a header of 101 MB": ("hf", lambda root: long_header(root / "model.safetensors"), "model.safetensors"),
    "an index is absolute": (
        "hf",
        lambda root: (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}})),
        "leads out of the directory",
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
        for key, value in (
            ("rope_parameters", 5),
            ("vocab_size", "100"),
            ("num_hidden_layers", -1),
            ("hidden_size", 64.5),
            ("decoder_sparse_step", "x"),
            ("mlp_only_layers", 5),
        )
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
    refused(CASES[name], home, tmp_path, capsys)


def test_the_witness_would_be_there(tmp_path, monkeypatch) -> None:
    """The negative control: opened without care, such a file does run."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs(os.mkdir, WITNESS)))
    assert Path(WITNESS).exists()


def test_an_untouched_copy_converts(home, tmp_path) -> None:
    write(plan(Request(home / "torch", tmp_path / "out", "hf")))
    first, second = load_file(tmp_path / "out" / "model.safetensors"), load_file(home / "hf" / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in second)
