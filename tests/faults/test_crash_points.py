"""T2, T18, T19, T22: killed at every call that touches the disk, nothing is lost and nothing half-made is taken for whole."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from disk import killed_at, watch
from harness import flags, fork, left, run, stage_module, wait
from safetensors.torch import load_file
from tiny import build
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.checkpoints import writing
from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.writing import write
from rlhf.config.parse import parse
from rlhf.digest import tree_digest
from rlhf.errors import StorageError
from rlhf.models.save import save_model
from rlhf.runs.manifest import read_status
from rlhf.training import checkpoint, session

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"w.exp_avg": torch.ones(2, 3)}}


def save(root: Path, step: int, keep: int, said: str = "") -> Path:
    return checkpoint.save(root, step, TENSORS, {"step": step, "said": said}, keep)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def quiet(text: str) -> None: ...


def at_every_point(root: Callable[[int], Path], body: Callable[[Path, Callable[[], None]], object], log: Path):
    """Kills `body` at its first call on the disk, at its second and so on, each time in a directory that `root` makes; gives
    that directory."""
    for number in count(1):
        here = root(number)
        if not killed_at(number, here, lambda begin, here=here: body(here, begin), log):
            print(f"{number - 1} points")
            assert number > 10
            return
        yield here


@pytest.mark.parametrize(
    ("before", "step", "keep"), [([1], 2, 1), ([1, 2], 3, 2), ([1], 1, 1)], ids=["keep 1", "keep 2", "the same step again"]
)
def test_a_checkpoint(before, step, keep, tmp_path):
    """What a kill leaves has a valid checkpoint, the newest or the one before, and the same save goes through afterwards."""

    def prepared(number: int) -> Path:
        for old in before:
            save(tmp_path / str(number) / "checkpoints", old, keep, "before")
        return tmp_path / str(number) / "checkpoints"

    def again(root: Path, begin: Callable[[], None] = lambda: None) -> None:
        begin()
        save(root, step, keep, "after")

    again(whole := prepared(0))
    for root in at_every_point(prepared, again, tmp_path / "log"):
        found = checkpoint.latest(root, quiet)
        assert found is not None
        assert found.state() in ({"step": before[-1], "said": "before"}, {"step": step, "said": "after"})
        assert torch.equal(found.tensors("model")["w"], TENSORS["model"]["w"])
        assert not [name for name in names(root) if name.startswith(".") or name.endswith(".corrupt")]
        again(root)
        assert names(root) == names(whole)
        assert tree_digest(root) == tree_digest(whole)


END = {"schedule__length": 1, "data__eval": "null"}


@pytest.fixture(scope="module")
def ended(world, tmp_path_factory):
    """(a run stopped before `finish`, what it leaves if nothing stops it) of a stage."""

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def made(stage: str) -> tuple[Path, dict[str, object]]:
        directory = tmp_path_factory.mktemp("ended")
        log, stopped = directory / "log", flags(stage, world, directory / "stopped", **END)
        assert run(stage, stopped, log, lambda module: setattr(session, "finish", die)) == -signal.SIGKILL
        assert run(stage, flags(stage, world, directory / "whole", **END), log) == 0, log.read_text()
        return directory / "stopped", left(directory / "whole", steps=1)

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "saved"), [("sft", False), ("ppo", True)], ids=["sft", "ppo, where an earlier result lies"])
def test_the_end_of_a_stage(stage, saved, ended, world, tmp_path):
    """From the first file of model/ to status.json."""
    stopped, expected = ended(stage)

    def prepared(number: int) -> Path:
        output = Path(shutil.copytree(stopped, tmp_path / str(number) / "run"))
        if not saved:
            shutil.rmtree(output / "model")
        return output

    def end(output: Path, begin: Callable[[], None]) -> None:
        module = stage_module(stage)
        right, begun = module.save_model, []

        def watched(*arguments, **options) -> None:
            if not begun:
                begun.append(begin())
            right(*arguments, **options)

        module.save_model = watched
        module.main(parse(stage, flags(stage, world, output, **END)))

    log = tmp_path / "log"
    for output in at_every_point(prepared, end, log):
        for part in ("model", "critic"):
            found = {name: content for name, content in left(output, steps=1).items() if name.startswith(f"{part}/")}
            assert found in ({}, {name: content for name, content in expected.items() if name.startswith(f"{part}/")})
        assert run(stage, flags(stage, world, output, **END), log) == 0, log.read_text()
        assert left(output, steps=1) == expected
        status = read_status(output)
        assert status is not None
        assert status["state"] == "done"
        assert [name for name in names(output) if name.startswith(".")] == [".lock"]
        assert not [name for name in names(output / "checkpoints") if name.startswith(".")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """hf/ and the Megatron files made from it."""
    directory = tmp_path_factory.mktemp("sources")
    build("llama", directory / "hf", num_hidden_layers=1)
    write(plan(Request(directory / "hf", directory / "megatron", "megatron", grid=Grid(2))))
    return directory


CONVERSIONS = {
    "to megatron": ("hf", {"target": "megatron", "grid": Grid(2)}),
    "to torch_dist": ("hf", {"target": "megatron", "layout": "torch_dist"}),
    "to hf": ("megatron", {"target": "hf"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion(conversion, sources, tmp_path, monkeypatch):
    """The destination is absent or complete, the source is untouched, and the same command makes it."""
    monkeypatch.setattr(writing, "WRITERS", 1)  # in one order, in which pieces then lie in a .distcp file
    name, options = CONVERSIONS[conversion]
    source, target = sources / name, options["target"]
    others = {key: value for key, value in options.items() if key != "target"}

    def convert(home: Path, begin: Callable[[], None] = lambda: None) -> None:
        begin()
        write(plan(Request(source, home / "out", target, **others)))

    def prepared(number: int) -> Path:
        (tmp_path / str(number)).mkdir()
        return tmp_path / str(number)

    convert(whole := prepared(0))
    before, expected = tree_digest(source), tree_digest(whole / "out")
    for home in at_every_point(prepared, convert, tmp_path / "log"):
        assert tree_digest(source) == before
        if not (home / "out").exists():
            convert(home)
        assert tree_digest(home / "out") == expected
        assert names(home) == {"out"}


@pytest.mark.parametrize("fault", ["save_file", "rename", "verify"])
def test_a_save_that_fails_leaves_the_checkpoint_before_it(fault, tmp_path, monkeypatch):
    """T19, with one checkpoint kept."""
    save(tmp_path, 1, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    if fault == "verify":
        monkeypatch.setattr(checkpoint, "verify", lambda *_: "model.safetensors has changed")
    else:
        monkeypatch.setattr(*((checkpoint, "save_file", full) if fault == "save_file" else (Path, "rename", full)))
    for step in (2, 1):
        with pytest.raises(StorageError, match="has changed" if fault == "verify" else "No space left"):
            save(tmp_path, step, keep=1)
        assert names(tmp_path) == {"step-1"}
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path, quiet)
    assert found is not None
    assert found.step == 1


def test_a_mapped_file_outlives_its_checkpoint(tmp_path):
    """T22: truncated in place it would end this process by SIGBUS."""
    save(tmp_path, 1, keep=1)
    file = tmp_path / "step-1" / "model.safetensors"
    mapped, inode = load_file(file), file.stat().st_ino
    save(tmp_path, 1, keep=1)
    assert file.stat().st_ino != inode
    save(tmp_path, 2, keep=1)
    assert not file.exists()
    assert torch.equal(mapped["w"], TENSORS["model"]["w"])


def test_a_mapped_result_outlives_its_successor(world, tmp_path):
    tokenizer, model = (kind.from_pretrained(world / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    save_model(model, tmp_path / "model", tokenizer)
    file = tmp_path / "model" / "model.safetensors"
    mapped, inode = load_file(file), file.stat().st_ino
    before = {name: tensor.clone() for name, tensor in mapped.items()}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    save_model(model, tmp_path / "model", tokenizer)
    assert file.stat().st_ino != inode
    assert all(torch.equal(mapped[name], tensor) for name, tensor in before.items())
    assert not any(tensor.any() for tensor in load_file(file).values())
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_no_file_is_written_in_place(stage, world, tmp_path):
    """T22, over a whole run: what is opened for writing was not there, but for what lines are appended to. What has a hidden
    name, or lies below one, is not in its place yet."""

    def strictly(what: str, path: str) -> None:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(tmp_path).parts)
        if what in ("open", "write") and not hidden and os.path.exists(path):
            raise AssertionError(f"{path}: written in place")

    def body() -> None:
        watch(tmp_path, strictly)
        arguments = flags(stage, world, tmp_path / "run", schedule__length=2, checkpoint__keep=1)
        stage_module(stage).main(parse(stage, arguments))

    log = tmp_path.with_name(f"{tmp_path.name}.log")
    assert wait(fork(body, log=log)) == 0, log.read_text()
