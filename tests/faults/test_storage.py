"""T3, T4, T17: disks that are full or may not be written, and two runs in one place."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from harness import flags, run, start, start_on, wait, wait_until

from rlhf.errors import StorageError
from rlhf.training import checkpoint

STAGES = ("sft", "rm", "ppo")


def limit(size: int):
    """No file of the run may grow past `size` bytes: to who writes it, a full disk (EFBIG in place of ENOSPC)."""

    def change(module) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "every"), [(100, 1), (20_000, 1), (20_000, 0)], ids=["nothing fits", "no checkpoint fits", "no result fits"]
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk(stage, size, every, world, tmp_path):
    """The run ends with 74 and one message; once there is room, the same command ends it."""
    output = tmp_path / stage
    arguments = flags(stage, world, output, schedule__length=2, checkpoint__every=every)
    reader, writer = os.pipe()  # what it says must not be cut as files are

    def change(module) -> None:
        sys.stdout = sys.stderr = os.fdopen(writer, "w", buffering=1)
        limit(size)(module)

    pid = start(stage, arguments, None, change)
    os.close(writer)
    said = os.fdopen(reader).read()
    assert wait(pid) == 74, said
    assert "Traceback" not in said
    assert str(output) in said
    assert "bytes are free" in said or "the checkpoint could not be written" in said
    assert not list(output.rglob(".tmp-*"))
    assert not list(output.glob(".model-*"))
    assert run(stage, arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_keeps_what_was_saved(stage, world, tmp_path):
    output, log = tmp_path / stage, tmp_path / "log"
    arguments = flags(stage, world, output, schedule__length=4, checkpoint__keep=1)

    def full_from_step_3(module) -> None:
        right = checkpoint.save_file

        def save_file(tensors, file) -> None:
            if "step-3" in str(file):
                raise OSError(28, "No space left on device")
            right(tensors, file)

        checkpoint.save_file = save_file

    assert run(stage, arguments, log, full_from_step_3) == 74
    assert "No space left on device" in log.read_text()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-2"]
    assert checkpoint.verify(output / "checkpoints" / "step-2", 2) == ""
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    assert run(stage, arguments, log) == 0, log.read_text()


def test_a_run_that_cannot_fit_does_not_begin(world, tmp_path):
    """3 checkpoints of weights and two moments, and the result: 10 times the weights."""
    log, output = tmp_path / "log", tmp_path / "sft"

    def nearly_full(module) -> None:
        real = shutil.disk_usage

        def little(path):
            return real(path)._replace(free=10_000)

        checkpoint.shutil.disk_usage = little

    assert run("sft", flags("sft", world, output, schedule__length=3), log, nearly_full) == 74
    assert "bytes are needed (3 checkpoints of " in log.read_text()
    assert "10,000 are free; make room, or lower checkpoint.keep" in log.read_text()
    assert not (output / "checkpoints").exists()


@pytest.mark.parametrize(("there", "count", "enough"), [(0, 2, False), (1, 2, True), (3, 2, True), (0, 1, True)])
def test_room_is_asked_for_what_is_not_there(there, count, enough, tmp_path, monkeypatch):
    """150 bytes are free, a checkpoint takes 100 and the result 50."""
    root = tmp_path / "checkpoints"
    for step in range(there):
        (root / f"step-{step}").mkdir(parents=True)
    usage = shutil.disk_usage(tmp_path)._replace(free=150)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if enough:
        checkpoint.require_room(root, 100, count, 50)
    else:
        with pytest.raises(StorageError, match=r"250 bytes are needed \(2 checkpoints of 100, and the result\), 150 are free"):
            checkpoint.require_room(root, 100, count, 50)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes nobody, which only root may")
@pytest.mark.parametrize("kind", ["read-only", "under a file"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_output_that_cannot_be_made(stage, kind, world, tmp_path):
    """Said before a model is opened, by the recipe itself, too; root may write anywhere, so the child is nobody."""
    log = tmp_path / "log"
    place = tmp_path / "place"
    if kind == "read-only":
        place.mkdir(mode=0o555)
    else:
        place.write_text("a file")
    temporary = Path(tempfile.gettempdir())
    if not tmp_path.is_relative_to(temporary):
        pytest.skip("nobody cannot reach a directory that is not below the system's temporary one")
    for directory in (tmp_path, *tmp_path.relative_to(temporary).parents):
        (temporary / directory).chmod((temporary / directory).stat().st_mode | (0o055 if directory != Path() else 0))
    log.touch()
    log.chmod(0o666)

    def as_nobody(module) -> None:
        os.setuid(65534)
        module.open_sft = module.open_rm = module.open_ppo = None  # what would open models

    began = time.monotonic()
    assert run(stage, flags(stage, world, place / "run"), log, as_nobody) == 73, log.read_text()
    assert time.monotonic() - began < 20  # no model is opened, nothing is waited for
    assert str(place) in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_runs_in_one_place(processes, world, tmp_path):
    """The second ends at once and says who is there; the first goes on; a killed one leaves no lock."""
    output, log = tmp_path / "sft", tmp_path / "log"
    arguments = flags("sft", world, output, schedule__length=400)
    first = start_on(processes, "sft", arguments, tmp_path / "first")
    wait_until((output / "metrics.jsonl").exists)
    second = [wait(pid) for pid in start_on(processes, "sft", arguments, log)]
    assert second == [75] * processes, log.read_text()
    assert f"another run is writing here: pid {first[0]} on " in log.read_text()
    for number in (signal.SIGSTOP, signal.SIGKILL):  # or the second would end because the first is gone
        for pid in first:
            os.kill(pid, number)
    for pid in first:
        assert wait(pid) == -signal.SIGKILL  # it was still there
    shorter = flags("sft", world, output, schedule__length=400, max_hours=1e-9)
    assert {wait(pid) for pid in start_on(processes, "sft", shorter, log)} == {143}, log.read_text()


def test_the_status_of_a_full_disk_is_said_all_the_same(world, tmp_path):
    """status.json itself cannot be written: the message and the exit code still are right."""
    log = tmp_path / "log"

    def nothing_fits(module) -> None:
        from rlhf.runs import manifest

        right = manifest.write_json

        def write_json(path: Path, value) -> None:
            if path.name == "status.json" and value["state"] == "failed":
                raise OSError(28, "No space left on device")
            right(path, value)

        manifest.write_json = write_json

        def save(*_):
            raise StorageError("the disk is full")

        checkpoint.save = save

    assert run("sft", flags("sft", world, tmp_path / "sft"), log, nothing_fits) == 74
    assert "the disk is full" in log.read_text()
    assert "status.json cannot say so: [Errno 28] No space left on device" in log.read_text()
