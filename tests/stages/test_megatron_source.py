"""A Megatron checkpoint as the model of a stage: converted once, proven, recorded; and the finished actor taken back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import flags, metrics, run, run_on_two
from safetensors.torch import load_file

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.writing import write
from rlhf.cli import main


@pytest.fixture
def megatron(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    write(plan(Request(world / "model", tmp_path / "megatron", "megatron", grid=Grid(2, 2))))
    return tmp_path / "megatron"


def test_sft_rm_ppo_from_a_megatron_directory(world, megatron, tmp_path) -> None:
    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft", model=megatron), log) == 0, log.read_text()
    assert run("rm", flags("rm", world, tmp_path / "rm", model=megatron), log) == 0, log.read_text()
    both = {"critic": tmp_path / "rm", "reward": tmp_path / "rm", "schedule__length": 2}
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", actor=megatron, **both), log) == 0, log.read_text()
    assert len(list((tmp_path / "cache" / "megatron").glob("*/conversion.json"))) == 1  # once for the three of them
    actor = json.loads((tmp_path / "ppo" / "run.json").read_text())["inputs"]["actor"]
    assert actor["path"].endswith("megatron")
    assert actor["digest"]

    assert main(["convert", str(tmp_path / "ppo"), str(tmp_path / "back"), "--to", "megatron", "--tp", "2", "--verify"]) == 0
    assert main(["convert", str(tmp_path / "back"), str(tmp_path / "again"), "--to", "hf"]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("ppo/model", "again"))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_same_run_as_from_hugging_face(world, megatron, tmp_path) -> None:
    for name, model in (("hf", world / "model"), ("mg", megatron)):
        assert run("sft", flags("sft", world, tmp_path / name, model=model), tmp_path / "log") == 0, (
            tmp_path / "log"
        ).read_text()
    assert metrics(tmp_path / "hf") == metrics(tmp_path / "mg")


def test_two_processes_convert_once(world, megatron, tmp_path) -> None:
    assert run_on_two("sft", flags("sft", world, tmp_path / "sft", model=megatron), tmp_path / "log") == [0, 0]
    assert len(list((tmp_path / "cache" / "megatron").glob("*/conversion.json"))) == 1


def test_a_changed_checkpoint_is_a_changed_input(world, megatron, tmp_path) -> None:
    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft", model=megatron), log) == 0, log.read_text()
    (megatron / "release" / "mp_rank_00_000" / "more.txt").write_text("x")
    assert run("sft", flags("sft", world, tmp_path / "sft", model=megatron), log) == 65
    assert "model" in log.read_text().splitlines()[-1] or "contents" in log.read_text()


def test_a_checkpoint_without_a_tokenizer_says_what_to_do(world, megatron, tmp_path) -> None:
    for file in megatron.glob("tokenizer*"):
        file.unlink()
    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft", model=megatron), log) == 65
    assert "tokenizer" in log.read_text().splitlines()[-1]


def test_an_iteration_without_its_tracker_is_named(world, megatron, tmp_path) -> None:
    (megatron / "latest_checkpointed_iteration.txt").unlink()
    shutil.move(megatron / "release", megatron / "iter_0000005")
    log = tmp_path / "log"
    (megatron / "config.json").rename(megatron / "other.json")
    assert run("sft", flags("sft", world, tmp_path / "sft", model=megatron), log) == 65
    assert "name one of its iterations" in log.read_text()
