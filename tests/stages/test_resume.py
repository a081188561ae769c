"""Killed anywhere, the same command goes on to the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from harness import flags, metrics, run, start, start_on, wait

STAGES = ("sft", "rm", "ppo")


def arguments(stage: str, world: Path, output: Path) -> list[str]:
    return flags(stage, world, output, schedule__length=8)


def left(output: Path, steps: int = 8) -> dict[str, object]:
    """All that must be equal to the bit: metrics, samples, results, and the last training checkpoint."""
    files = [path for part in ("model", "critic", f"checkpoints/step-{steps}") for path in sorted((output / part).glob("*"))]
    contents = {str(path.relative_to(output)): path.read_bytes() for path in files}
    samples = (output / "samples.jsonl").read_text() if (output / "samples.jsonl").exists() else ""
    return contents | {"metrics": metrics(output), "samples": samples}


def whole_runs(processes: int, world: Path, directory: Path) -> dict[str, tuple[dict[str, object], float]]:
    """(what a run that nothing interrupts leaves, seconds it took) by stage."""
    found = {}
    for stage in STAGES:
        output, log, began = directory / stage, directory / "log", time.monotonic()
        codes = [wait(pid) for pid in start_on(processes, stage, arguments(stage, world, output), log)]
        assert codes == [0] * processes, log.read_text()
        found[stage] = left(output), time.monotonic() - began
    return found


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    return whole_runs(1, world, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def uninterrupted_on_two(world, tmp_path_factory):
    return whole_runs(2, world, tmp_path_factory.mktemp("whole"))


def kill_until_done(processes: int, stage: str, world: Path, output: Path, seconds: float, seed: int) -> None:
    """Kills the run at random moments, one to four times, and lets it end. A run that was never hit starts afresh."""
    draw, log, kills = random.Random(seed), output.parent / "log", 0
    while True:
        pids = start_on(processes, stage, arguments(stage, world, output), log)
        if kills < 4:
            time.sleep(draw.uniform(0.05, 1.0) * seconds)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        codes = {wait(pid) for pid in pids}
        if codes == {0} and kills:
            return
        if codes == {0}:
            shutil.rmtree(output)
            seconds *= 0.8
            continue
        assert codes <= {0, -signal.SIGKILL}, log.read_text()
        kills += 1


@pytest.mark.parametrize("trial", range(1))
@pytest.mark.parametrize("stage", STAGES)
def test_sigkill(stage, trial, world, uninterrupted, tmp_path):
    expected, seconds = uninterrupted[stage]
    kill_until_done(1, stage, world, tmp_path / stage, seconds, seed=trial)
    assert left(tmp_path / stage) == expected


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(1, 13))
@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_again(stage, trial, world, uninterrupted, tmp_path):
    expected, seconds = uninterrupted[stage]
    kill_until_done(1, stage, world, tmp_path / stage, seconds, seed=trial)
    assert left(tmp_path / stage) == expected


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_of_two_processes(stage, trial, world, uninterrupted_on_two, tmp_path):
    expected, seconds = uninterrupted_on_two[stage]
    kill_until_done(2, stage, world, tmp_path / stage, seconds, seed=trial)
    assert left(tmp_path / stage) == expected


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_saves_and_says_so(stage, world, uninterrupted, tmp_path):
    expected, _ = uninterrupted[stage]
    output, log = tmp_path / stage, tmp_path / "log"
    pid = start(stage, arguments(stage, world, output), log)
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 143, log.read_text()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 143)
    assert run(stage, arguments(stage, world, output), log) == 0, log.read_text()
    assert left(output) == expected
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
