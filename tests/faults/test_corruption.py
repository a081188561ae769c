"""T5: whatever happens to the files of a checkpoint, it is noticed, said and passed over; nothing starts silently from zero."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import flags, left, run

from rlhf.errors import DataError
from rlhf.training import checkpoint

TRIALS = 400
STAGES = ("sft", "rm", "ppo")
BLOCK = 4096
"""Bytes that a disk loses at once."""

STEPS = 3


def flip(file: Path, draw: random.Random, older: Path) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, draw: random.Random, older: Path) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size - 1))  # the very last byte of JSON is an end of line: it says nothing


def zero_a_block(file: Path, draw: random.Random, older: Path) -> None:
    content = bytearray(file.read_bytes())
    blocks = [place for place in range(0, len(content), BLOCK) if any(content[place : place + BLOCK])]
    begin = draw.choice(blocks)
    content[begin : begin + BLOCK] = bytes(len(content[begin : begin + BLOCK]))
    file.write_bytes(content)


def zero_all(file: Path, draw: random.Random, older: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def remove(file: Path, draw: random.Random, older: Path) -> None:
    file.unlink()


def swap_in_an_older_one(file: Path, draw: random.Random, older: Path) -> None:
    shutil.copyfile(older / file.name, file)


def add_a_file(file: Path, draw: random.Random, older: Path) -> None:
    shutil.copyfile(file, file.with_name(f"other-{file.name}"))


def change_the_manifest(file: Path, draw: random.Random, older: Path) -> None:
    """To what a changed file is, but not its own digest."""
    model, manifest = file.with_name("model.safetensors"), file.with_name(checkpoint.MANIFEST)
    before = hashlib.sha256(model.read_bytes()).hexdigest()
    flip(model, draw, older)
    text = manifest.read_text()
    assert before in text
    manifest.write_text(text.replace(before, hashlib.sha256(model.read_bytes()).hexdigest()))


CORRUPTIONS: list[Callable[[Path, random.Random, Path], None]] = [
    flip, truncate, zero_a_block, zero_all, remove, swap_in_an_older_one, add_a_file, change_the_manifest,
]  # fmt: skip
FILES = ("model.safetensors", "optimizer.safetensors", checkpoint.STATE, checkpoint.MANIFEST)


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """(a run of each stage killed before its result was saved, what it leaves if nothing stops it)."""

    def die(*_, **__) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    found = {}
    for stage in STAGES:
        directory = tmp_path_factory.mktemp("stopped")
        log, arguments = directory / "log", flags(stage, world, directory / "run", schedule__length=STEPS)
        assert run(stage, arguments, log, lambda module: setattr(module, "save_model", die)) == -signal.SIGKILL
        whole = flags(stage, world, directory / "whole", schedule__length=STEPS)
        assert run(stage, whole, log) == 0, log.read_text()
        found[stage] = directory / "run", left(directory / "whole", STEPS)
    return found


def test_every_corruption_is_noticed_and_passed_over(stopped, tmp_path):
    draw, seen = random.Random(0), set()
    for trial in range(TRIALS):
        stage, corrupt = STAGES[trial % len(STAGES)], CORRUPTIONS[trial % len(CORRUPTIONS)]
        name = FILES[trial // (len(STAGES) * len(CORRUPTIONS)) % len(FILES)]
        root, (run_of, _) = tmp_path / str(trial), stopped[stage]
        shutil.copytree(run_of / "checkpoints", root)
        newest, older = root / f"step-{STEPS}", root / f"step-{STEPS - 1}"
        corrupt(newest / name, draw, older)
        said: list[str] = []
        found = checkpoint.latest(root, said.append)
        assert found is not None
        assert found.step == STEPS - 1, (corrupt.__name__, stage, name)
        assert f"step-{STEPS} is corrupt" in said[0]
        assert (root / f"step-{STEPS}.corrupt").is_dir()
        seen.add((stage, corrupt, name))
        if trial % 40 == 0:  # and with that one gone, too, it is an error, now and the next time
            (older / name).unlink()
            for _ in range(2):
                with pytest.raises(DataError, match="no checkpoint verifies"):
                    checkpoint.latest(root, said.append)
        shutil.rmtree(root)
    assert len(seen) == len(STAGES) * len(CORRUPTIONS) * len(FILES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_rerun_ends_with_the_same_bits(stage, stopped, world, tmp_path):
    run_of, expected = stopped[stage]
    output, log = Path(shutil.copytree(run_of, tmp_path / stage)), tmp_path / "log"
    draw, newest = random.Random(stage), output / "checkpoints" / f"step-{STEPS}"
    flip(newest / FILES[STAGES.index(stage)], draw, newest)
    arguments = flags(stage, world, output, schedule__length=STEPS)
    assert run(stage, arguments, log) == 0, log.read_text()
    assert f"/checkpoints/step-{STEPS - 1}: " in log.read_text()
    assert left(output, STEPS) == expected


def test_with_none_left_the_run_ends_and_says_so(stopped, world, tmp_path):
    output, log = Path(shutil.copytree(stopped["sft"][0], tmp_path / "sft")), tmp_path / "log"
    for file in (output / "checkpoints").glob("*/model.safetensors"):
        flip(file, random.Random(0), file)
    for _ in range(2):
        assert run("sft", flags("sft", world, output, schedule__length=STEPS), log) == 65
        assert "no checkpoint verifies" in log.read_text()
    assert not (output / "model").exists()
