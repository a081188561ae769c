"""T6: SIGTERM and SIGINT end a run at its next boundary, saved; a second one ends it at once. The status tells the truth."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import flags, left, run, start, start_on, wait

STAGES = ("sft", "rm", "ppo")
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def has_begun(output: Path) -> bool:
    file = output / "metrics.jsonl"
    return file.exists() and '"tokens"' in file.read_text()


def wait_until(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_first_signal_saves(stage, number, world, whole, tmp_path):
    output, log = tmp_path / stage, tmp_path / "log"
    arguments = flags(stage, world, output, schedule__length=8, checkpoint__every=0)  # only the signal saves
    pid = start(stage, arguments, log)
    wait_until(lambda: has_begun(output))
    os.kill(pid, number)
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
    pids = start_on(2, stage, arguments, log)
    wait_until(lambda: has_begun(output))
    time.sleep(random.Random(f"{stage} {rank}").uniform(0, 0.3))
    os.kill(pids[rank], signal.SIGTERM)
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
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(pid, number)
    assert wait(pid) == CODES[number]
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_the_command_says_what_the_stage_said(world, tmp_path):
    """`rlhf sft` over torchrun, which returns 1 for everything: its own exit code and status.json are the stage's."""
    output, log = tmp_path / "sft", tmp_path / "log"
    arguments = flags("sft", world, output, schedule__length=100_000, threads=1)
    argv = [sys.executable, "-m", "rlhf", "sft", "--nproc=2", "--launch=cpu", *arguments]
    with log.open("w") as stream, subprocess.Popen(argv, stdout=stream, stderr=stream) as process:
        wait_until(lambda: has_begun(output), seconds=180)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143, log.read_text()
    assert status(output) == ("preempted", 143)
    assert (output / "checkpoints").is_dir()
