"""T7: a process that dies or freezes ends the others, which say which one it was; nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
from harness import before_each_step, flags, left, start_on, wait, wait_until

from rlhf.training import ending, processes

SECONDS = 4


def short_timeout() -> None:
    processes.COLLECTIVE_TIMEOUT = ending.COLLECTIVE_TIMEOUT = timedelta(seconds=SECONDS)


def at_step_3(what):
    """Rank 1 does it as it begins its fourth step."""

    def act(train) -> None:
        if train.step_done == 3 and train.rank == 1:
            what()

    def change(module) -> None:
        short_timeout()
        before_each_step(act)(module)

    return change


def raises() -> None:
    raise RuntimeError("a mistake on one rank")


def is_killed() -> None:
    signal.raise_signal(signal.SIGKILL)


def freezes() -> None:
    signal.raise_signal(signal.SIGSTOP)


def sleeps() -> None:
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
@pytest.mark.parametrize(("fault", "code"), [(is_killed, -signal.SIGKILL), (raises, 70)])
def test_a_rank_that_dies(stage, fault, code, world, tmp_path):
    """The other is gone within 5 s, says who is missing, and the run goes on to the bits it would have had."""
    output, log = tmp_path / stage, tmp_path / "log"
    arguments = flags(stage, world, output, schedule__length=6)
    first, second = start_on(2, stage, arguments, log, at_step_3(fault))
    assert wait(second) == code
    began = time.monotonic()
    assert wait(first) == 74, log.read_text()
    assert time.monotonic() - began < 10  # 5 s, on a machine that does nothing else
    assert f"rank 1 (pid {second} on " in log.read_text()
    assert json.loads((output / "status.json").read_text())["exit_code"] == (70 if fault is raises else 74)
    whole = tmp_path / "whole"
    assert [wait(pid) for pid in start_on(2, stage, arguments, log)] == [0, 0], log.read_text()
    pids = start_on(2, stage, flags(stage, world, whole, schedule__length=6), log)
    assert [wait(pid) for pid in pids] == [0, 0], log.read_text()
    assert left(output, steps=6) == left(whole, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "says"), [(freezes, "rank 1 (pid {} on "), (sleeps, "it hangs, or its machine is gone")])
def test_a_rank_that_freezes(fault, says, world, tmp_path):
    """After the longest that a rank waits for another, and 5 s; a stopped one is named."""
    output, log = tmp_path / "sft", tmp_path / "log"
    first, second = start_on(2, "sft", flags("sft", world, output, schedule__length=6), log, at_step_3(fault))
    wait_until((output / "checkpoints" / "step-3").exists)
    began = time.monotonic()
    assert wait(first) == 74, log.read_text()
    assert time.monotonic() - began < SECONDS + 10  # 5 s, on a machine that does nothing else
    assert f"no answer from another process for {SECONDS / 60:.2g} minutes: {says.format(second)}" in log.read_text()
    assert ("is stopped" in log.read_text()) == (fault is freezes)
    assert json.loads((output / "status.json").read_text())["exit_code"] == 74
    os.kill(second, signal.SIGKILL)
    assert wait(second) == -signal.SIGKILL
    assert [wait(pid) for pid in start_on(2, "sft", flags("sft", world, output, schedule__length=6), log)] == [0, 0]


@pytest.mark.slow
def test_the_command_leaves_nobody_behind(world, tmp_path):
    """One process of `rlhf sft --nproc 2` is killed: the launcher, the other process and the command end."""
    output, log = tmp_path / "sft", tmp_path / "log"
    argv = [sys.executable, "-m", "rlhf", "sft", "--nproc=2", "--launch=cpu"]
    argv += flags("sft", world, output, schedule__length=100_000)
    with log.open("w") as stream, subprocess.Popen(argv, stdout=stream, stderr=stream) as command:
        wait_until((output / "metrics.jsonl").exists, seconds=180)
        family = psutil.Process(command.pid).children(recursive=True)
        ranks = [process for process in family if process.environ().get("RANK") == "1"]
        ranks[0].kill()
        assert command.wait(timeout=60) == 74, log.read_text()
    assert psutil.wait_procs(family, timeout=10)[1] == []
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 74)
    assert f"rank 1 (pid {ranks[0].pid} on " in status["reason"]
