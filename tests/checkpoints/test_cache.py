"""A Megatron checkpoint in the cache: only what is proven is there, and only for what it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import build

from rlhf.checkpoints import verify
from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.writing import write
from rlhf.errors import CheckFailed, DataError
from rlhf.models import megatron


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("llama")
    build("llama", home / "hf")
    (home / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    (home / "hf" / "tokenizer.model").write_text("pieces")
    for layout in ("torch", "torch_dist"):
        write(plan(Request(home / "hf", home / layout, "megatron", layout=layout)))
    return home


@pytest.fixture
def checkpoint(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(home / "torch", tmp_path / "torch"))


def kept(tmp_path: Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "cache" / "megatron").iterdir() if entry.suffix != ".lock")


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_what_was_not_proven_is_not_taken(checkpoint, tmp_path, monkeypatch, end) -> None:
    proofs = []

    def ended(*arguments: object) -> None:
        proofs.append("begun")
        raise end

    real = verify.verify
    monkeypatch.setattr(verify, "verify", ended)
    with pytest.raises(end):
        megatron.converted(checkpoint)
    assert kept(tmp_path) == []
    monkeypatch.setattr(verify, "verify", lambda conversion: proofs.append("done") or real(conversion))
    assert megatron.converted(checkpoint).is_dir()
    assert megatron.converted(checkpoint).is_dir()
    assert proofs == ["begun", "done"]  # and the second time none


def test_what_a_kill_left_is_cleared(checkpoint, tmp_path) -> None:
    target = megatron.converted(checkpoint)
    shutil.rmtree(target)
    left = target.with_name(f"{target.name}-unproven")
    left.mkdir()
    (left / "config.json").write_text("{}")
    assert megatron.converted(checkpoint) == target
    assert kept(tmp_path) == [target.name]


def test_what_fails_its_proof_is_refused_each_time(checkpoint, tmp_path, monkeypatch) -> None:
    def failing(conversion: object) -> None:
        raise CheckFailed("not the same model")

    monkeypatch.setattr(verify, "verify", failing)
    for _ in range(2):
        with pytest.raises(DataError, match="converted, but not the same model"):
            megatron.converted(checkpoint)
        assert kept(tmp_path) == []


def change_config(root: Path) -> None:
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0, "rope_parameters": None}))


CHANGES = {
    "config.json": change_config,
    "the template": lambda root: (root / "chat_template.jinja").write_text("{{ other }}"),
    "the tokenizer": lambda root: (root / "tokenizer.model").write_text("other pieces"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("named", ["root", "iteration"])
def test_another_for_another_source(checkpoint, what, named) -> None:
    source = checkpoint / "release" if named == "iteration" else checkpoint

    def key() -> str:
        return megatron._key(plan(Request(source, checkpoint / "out", "hf")))

    before = key()
    assert key() == before
    CHANGES[what](checkpoint)
    assert key() != before


def test_the_key_counts_hidden_files_and_the_converter(home, tmp_path, monkeypatch) -> None:
    root = Path(shutil.copytree(home / "torch_dist", tmp_path / "dist"))

    def key() -> str:
        return megatron._key(plan(Request(root, tmp_path / "out", "hf")))

    before = key()
    metadata = root / "iter_0000000" / ".metadata"
    metadata.write_bytes(metadata.read_bytes() + b"\n")  # after pickle's STOP: it still reads the same
    changed = key()
    assert changed != before
    monkeypatch.setattr(megatron, "CONVERTER", 0)
    assert key() not in (before, changed)


def test_the_key_knows_the_weights(checkpoint, tmp_path) -> None:
    first = megatron._key(plan(Request(checkpoint, tmp_path / "out", "hf")))
    file = next(checkpoint.glob("release/*/*.pt"))
    content = torch.load(file, weights_only=False)
    content["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(content, file)
    assert megatron._key(plan(Request(checkpoint, tmp_path / "out", "hf"))) != first
