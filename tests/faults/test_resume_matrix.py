"""T1: stopped by SIGKILL at a chosen place, every stage goes on to the same bits: 3 stages x 1 and 2 processes x 6 places."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from harness import flags, left, start_on, wait

from rlhf.runs import manifest
from rlhf.runs.manifest import read_status
from rlhf.training import checkpoint, session
from rlhf.training.session import Training

STEPS, EVERY = 6, 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: object, name: str, number: int = 1, after: bool = False) -> None:
    """Ends this process where it calls the function for that time, or where that call returns."""
    right, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == number and not after:
            die()
        result = right(*arguments, **options)
        if len(calls) == number:
            die()
        return result

    setattr(owner, name, counted)


class Place(NamedTuple):
    stop: Callable[[ModuleType], None]
    goes_on_from: int
    """Steps done in the newest checkpoint."""
    dies: str
    """Which rank: what only rank 0 does is a place on rank 0 only."""


PLACES = {
    "in the first step": Place(lambda _: at_call(Training, "optimizer_step"), 0, "last"),
    "after a step with a checkpoint": Place(lambda _: at_call(Training, "save", 1, after=True), 2, "all"),
    "after a step without one": Place(lambda _: at_call(Training, "report", 3, after=True), 2, "last"),
    # Each checkpoint is two files, model and optimizer: this is between those of the second checkpoint.
    "in the write of a checkpoint": Place(lambda _: at_call(checkpoint, "save_file", 4), 2, "first"),
    "after the last step": Place(lambda module: at_call(module, "save_model"), STEPS, "first"),
    "between the result and run.json": Place(lambda _: at_call(session, "finish"), STEPS, "first"),
}


def ended(
    processes: int, stage: str, world: Path, output: Path, change: Callable[[ModuleType], None] | None = None
) -> list[int]:
    """Exit codes of a run."""
    arguments = flags(stage, world, output, schedule__length=STEPS, checkpoint__every=EVERY)
    return [wait(pid) for pid in start_on(processes, stage, arguments, output.with_name("log"), change)]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What a run leaves that nothing stops; each made once."""
    made: dict[tuple[str, int], dict[str, object]] = {}

    def run_of(stage: str, processes: int) -> dict[str, object]:
        if (stage, processes) not in made:
            output = tmp_path_factory.mktemp("whole") / stage
            assert ended(processes, stage, world, output) == [0] * processes, output.with_name("log").read_text()
            made[stage, processes] = left(output, STEPS)
        return made[stage, processes]

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "ppo"])
def test_goes_on_to_the_same_bits(stage, processes, place, world, whole, tmp_path):
    stop, goes_on_from, dies = PLACES[place]
    ranks = {"first": [0], "last": [processes - 1], "all": list(range(processes))}[dies]
    output, log = tmp_path / stage, tmp_path / "log"

    def change(module: ModuleType) -> None:
        if int(os.environ.get("RANK", "0")) in ranks:
            stop(module)

    codes = ended(processes, stage, world, output, change)
    assert codes[ranks[0]] == -signal.SIGKILL, log.read_text()
    assert set(codes) <= {-signal.SIGKILL, 74}, log.read_text()  # the other is killed too, or notices
    leftovers = list((output / "checkpoints").glob(".tmp-*"))
    assert bool(leftovers) == (place == "in the write of a checkpoint")
    assert ended(processes, stage, world, output) == [0] * processes, log.read_text()
    resumed = re.findall(r"goes on from .*/checkpoints/step-(\d+):", log.read_text())
    assert resumed == ([str(goes_on_from)] if goes_on_from else [])
    assert left(output, STEPS) == whole(stage, processes)
    assert not list((output / "checkpoints").glob(".*"))


def test_between_run_json_and_the_status(world, tmp_path):
    """The run is finished: it is not run again, and says so after the next start."""
    output, log = tmp_path / "sft", tmp_path / "log"
    assert ended(1, "sft", world, output, lambda _: at_call(manifest, "write_status")) == [-signal.SIGKILL]
    before, last = left(output, STEPS), (output / "run.json").read_bytes()
    assert read_status(output)["state"] == "running"
    assert ended(1, "sft", world, output) == [0]
    assert "is finished already" in log.read_text()
    assert read_status(output)["state"] == "done"
    assert (left(output, STEPS), (output / "run.json").read_bytes()) == (before, last)
