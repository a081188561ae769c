"""T6: SIGTERM and SIGINT end a run at its next boundary, saved; a second one ends it at once. The status tells the truth."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import before_each_step, flags, left, run, start, start_on, wait, wait_until

from rlhf.training import signals

STAGES = ("sft", "rm", "ppo")
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def has_begun(output: Path) -> bool:
    file = output / "metrics.jsonl"
    return file.exists() and '"tokens"' in file.read_text()


def pauses_in_step_3(place: Path):
    """The third step begins only once `place/go` is there, so that a signal comes while the run is under way."""

    def pause(train) -> None:
        while train.step_done == 2 and not (place / "go").exists():
            time.sleep(0.01)

    return before_each_step(pause)


def status(output: Path) -> tuple[str, int]:
    written = json.loads((output / "status.json").read_text())
    return written["state"], written["exit_code"]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What uninterrupted runs leave, by stage and processes; made when first asked for."""
    made: dict[tuple[str, int], dict[str, object]] = {}

    def of(stage: str, processes: int) -> dict[str, object]:
        if (stage, processes) not in made:
            output = tmp_path_factory.mktemp("whole") / stage
            pids = start_on(processes, stage, flags(stage, world, output, schedule__length=8), output.parent / "log")
            assert [wait(pid) for pid in pids] == [0] * processes
            made[stage, processes] = left(output, steps=8)
        return made[stage, processes]

    return of


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("sft", signal.SIGTERM),
        ("sft", signal.SIGINT),
        *(pytest.param(stage, number, marks=pytest.mark.slow) for stage in ("rm", "ppo") for number in CODES),
    ],
)
def test_the_first_signal_saves(stage, number, world, whole, tmp_path):
    output, log = tmp_path / stage, tmp_path / "log"
    arguments = flags(stage, world, output, schedule__length=8, checkpoint__every=0)  # only the signal saves
    pid = start(stage, arguments, log, pauses_in_step_3(tmp_path))
    wait_until(lambda: has_begun(output))
    os.kill(pid, number)
    os.kill(pid, number)  # from who signals a whole job as well as its launcher, which passes it on
    (tmp_path / "go").touch()
    assert wait(pid) == CODES[number], log.read_text()
    assert status(output) == ("preempted", CODES[number])
    (saved,) = (output / "checkpoints").iterdir()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert saved.name == f"step-{lines[-1]['step']}", "no step is lost"
    assert run(stage, arguments, log) == 0, log.read_text()
    without = {name: value for name, value in left(output, steps=8).items() if not name.startswith("checkpoints")}
    assert without == {name: value for name, value in whole(stage, 1).items() if not name.startswith("checkpoints")}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_to_one_rank_saves_on_all(stage, rank, world, whole, tmp_path):
    """Whichever rank it reaches, all stop after the same step, and go on to the same bits."""
    output, log = tmp_path / stage, tmp_path / "log"
    arguments = flags(stage, world, output, schedule__length=8)
    pids = start_on(2, stage, arguments, log, pauses_in_step_3(tmp_path))
    wait_until(lambda: has_begun(output))
    os.kill(pids[rank], signal.SIGTERM)
    (tmp_path / "go").touch()
    assert [wait(pid) for pid in pids] == [143, 143], log.read_text()
    assert status(output) == ("preempted", 143)
    assert [wait(pid) for pid in start_on(2, stage, arguments, log)] == [0, 0], log.read_text()
    assert left(output, steps=8) == whole(stage, 2)


@pytest.mark.parametrize("number", CODES)
def test_the_second_signal_ends_at_once(number, world, tmp_path):
    """In the middle of a step that does not end."""
    output, log = tmp_path / "sft", tmp_path / "log"

    def sleep_in_step_2(module) -> None:
        right, calls = module.sft_loss, []

        def slow(*arguments):
            calls.append(1)
            if len(calls) > 2:
                (tmp_path / "sleeps").touch()
                time.sleep(60)
            return right(*arguments)

        module.sft_loss = slow

    pid = start("sft", flags("sft", world, output, data__eval="null"), log, sleep_in_step_2)
    wait_until((tmp_path / "sleeps").exists)
    os.kill(pid, number)
    time.sleep(signals.ONE_SIGNAL_SECONDS + 0.5)
    began = time.monotonic()
    os.kill(pid, number)
    assert wait(pid) == CODES[number]
    assert time.monotonic() - began < 20  # and not 60
    assert status(tmp_path / "sft") == ("preempted", CODES[number])


def started_by_command(world: Path, output: Path, processes: int = 1, **more: object) -> subprocess.Popen[bytes]:
    """`rlhf sft` on a run without an end, under way."""
    arguments = flags("sft", world, output, schedule__length=100_000, **more)
    argv = [sys.executable, "-m", "rlhf", "sft", "--launch=cpu", f"--nproc={processes}", *arguments]
    log = (output.parent / "log").open("w")
    process = subprocess.Popen(argv, stdout=log, stderr=log)
    wait_until(lambda: has_begun(output) or process.poll() is not None, seconds=180)
    assert process.poll() is None, (output.parent / "log").read_text()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_says_what_the_stage_said(processes, world, tmp_path):
    """Over torchrun, which returns 1 for everything, and where the whole job is signalled: saved, with the stage's own code."""
    output = tmp_path / "sft"
    with started_by_command(world, output, processes, checkpoint__every=0) as process:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143, (tmp_path / "log").read_text()
    assert status(output) == ("preempted", 143)
    assert [path.name.startswith("step-") for path in (output / "checkpoints").iterdir()] == [True]


@pytest.mark.slow
def test_ctrl_c_twice_leaves_nobody_behind(world, tmp_path):
    output = tmp_path / "sft"
    with started_by_command(world, output) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert process.wait(timeout=60) == 130, (tmp_path / "log").read_text()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert status(output) == ("preempted", 130)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_ctrl_c_while_it_starts_is_no_traceback(world, tmp_path):
    argv = [sys.executable, "-m", "rlhf", "sft", "--launch=cpu", *flags("sft", world, tmp_path / "sft")]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        wait_until(lambda: psutil.Process(process.pid).children())
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
