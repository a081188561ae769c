"""Stopped by a signal that asks, the same command goes on to the same bits; another command does not go on at all."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from harness import flags, left, run, start, wait

STAGES = ("sft", "rm", "ppo")


def arguments(stage: str, world: Path, output: Path) -> list[str]:
    return flags(stage, world, output, schedule__length=8)


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """What a run leaves that nothing interrupts, by stage."""
    directory, found = tmp_path_factory.mktemp("whole"), {}
    for stage in STAGES:
        assert run(stage, arguments(stage, world, directory / stage), directory / "log") == 0, (directory / "log").read_text()
        found[stage] = left(directory / stage)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_and_says_so(stage, world, uninterrupted, tmp_path):
    output, log = tmp_path / stage, tmp_path / "log"
    pid = start(stage, arguments(stage, world, output), log)
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 143, log.read_text()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 143)
    assert run(stage, arguments(stage, world, output), log) == 0, log.read_text()
    assert left(output) == uninterrupted[stage]
    before = (output / "run.json").read_bytes()
    assert run(stage, arguments(stage, world, output), log) == 0  # finished: not run again
    assert (output / "run.json").read_bytes() == before


def test_a_changed_seed_is_refused(world, tmp_path):
    output, log = tmp_path / "sft", tmp_path / "log"
    pid = start("sft", arguments("sft", world, output), log)
    while not list((output / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    assert run("sft", [*arguments("sft", world, output), "--seed=1"], log) == 65
    assert "seed: 0 -> 1" in log.read_text()
