"""A training checkpoint is whole or not there, and a spoiled one is noticed."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from rlhf.errors import DataError, StorageError
from rlhf.training import checkpoint

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "optimizer": {"w.exp_avg": torch.ones(2, 3)}}
STATE = {"training": {"step": 3, "tokens": 0.1 + 0.2}, "kl": {"coef": 1 / 3}}


def quiet(text: str) -> None: ...


def test_round_trip_to_the_bit(tmp_path):
    checkpoint.save(tmp_path, 3, TENSORS, STATE, keep=2)
    found = checkpoint.latest(tmp_path, quiet)
    assert found is not None
    assert found.step == 3
    assert found.state() == STATE
    assert all(torch.equal(found.tensors(n)[k], v) for n, part in TENSORS.items() for k, v in part.items())
    assert checkpoint.latest(tmp_path / "nothing", quiet) is None


def test_rotation_keeps_the_newest(tmp_path):
    for step in (2, 10, 9, 11):
        checkpoint.save(tmp_path, step, TENSORS, STATE, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


@pytest.mark.parametrize("keep", [1, 2])
def test_every_crash_point_leaves_a_checkpoint(keep, tmp_path, monkeypatch):
    """Ends the process at the k-th call that touches the disk, for every k, until a save gets through."""
    patched = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree"), (checkpoint, "save_file")]
    for k in range(1, 100):
        root = tmp_path / str(k)
        checkpoint.save(root, 1, TENSORS, STATE, keep=keep)
        calls = 0
        with monkeypatch.context() as patch:
            for owner, name in patched:
                right = getattr(owner, name)

                def counted(*a, right=right, fatal=k, **kw):
                    nonlocal calls
                    calls += 1
                    if calls == fatal:
                        raise Killed
                    return right(*a, **kw)

                patch.setattr(owner, name, counted)
            try:
                checkpoint.save(root, 2, TENSORS, STATE, keep=keep)
            except Killed:
                survived = False
            else:
                survived = True
        found = checkpoint.latest(root, quiet)
        assert found is not None, k
        assert found.step in (1, 2)
        assert not list(root.glob(".tmp-*"))
        if survived:
            assert k > 10  # there were that many points to die at
            return
    pytest.fail("the save never got through")


def spoil(file: Path, how: str, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[draw.randrange(len(content)) :]
    elif how == "zero":
        content[:] = bytes(len(content))
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["flip", "cut", "zero", "remove", "swap"])
def test_corruption_is_noticed_and_passed_over(how, tmp_path):
    draw = random.Random(how)
    for trial in range(20):
        root = tmp_path / str(trial)
        checkpoint.save(root, 1, TENSORS, STATE, keep=2)
        checkpoint.save(root, 2, TENSORS, {**STATE, "other": trial}, keep=2)
        files = sorted((root / "step-2").iterdir())
        file = files[trial % len(files)]
        if how == "swap":
            file = root / "step-2" / ("state.json" if trial % 2 else "MANIFEST.json")
            shutil.copyfile(root / "step-1" / file.name, file)
        else:
            spoil(file, how, draw)
        said: list[str] = []
        found = checkpoint.latest(root, said.append)
        assert found is not None
        assert found.step == 1, (how, file.name)
        assert "corrupt" in said[0]
        assert (root / "step-2.corrupt").is_dir()


def test_no_valid_checkpoint_is_an_error_not_a_new_start(tmp_path):
    checkpoint.save(tmp_path, 1, TENSORS, STATE, keep=2)
    spoil(tmp_path / "step-1" / "model.safetensors", "flip", random.Random(0))
    for _ in range(2):  # nor the second time, when only the .corrupt is left
        with pytest.raises(DataError, match="no checkpoint verifies"):
            checkpoint.latest(tmp_path, quiet)


def test_a_full_disk_is_said_and_harms_nothing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, TENSORS, STATE, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        checkpoint.save(tmp_path, 2, TENSORS, STATE, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
