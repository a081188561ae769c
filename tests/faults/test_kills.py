"""T1: killed by SIGKILL at random moments, again and again, every stage ends with the bits of a run that nothing interrupts.

`make slow` kills each stage 30 times and more, `make soak` (KILLS=100) a hundred times; both print the table.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import flags, left, start_on, wait

STAGES = ("sft", "rm", "ppo")
KILLS = int(os.environ.get("KILLS", "36"))
"""Of each stage in the slow tier, in one process and in two."""
AT_MOST = 6
"""Kills of one run; then it may end."""


class Processes(NamedTuple):
    count: int
    engine: str

    def __str__(self) -> str:
        return f"{self.count} {self.engine}"


ONE, TWO, DIVIDED = Processes(1, "ddp"), Processes(2, "ddp"), Processes(2, "zero2")
SHARES = {ONE: 0.85, TWO: 0.15}
"""Of a stage's kills."""


class Whole(NamedTuple):
    leaves: dict[str, object]
    seconds: float


class Tally:
    """What the module's tests did, by stage and processes."""

    def __init__(self) -> None:
        self.kills: Counter[tuple[str, Processes]] = Counter()
        self.in_writes: Counter[tuple[str, Processes]] = Counter()
        self.runs: Counter[tuple[str, Processes]] = Counter()
        self.mismatches: Counter[tuple[str, Processes]] = Counter()
        self.wall: Counter[tuple[str, Processes]] = Counter()
        self.cpu: Counter[tuple[str, Processes]] = Counter()

    def table(self) -> str:
        head = "| stage | processes | kills | inside a write | runs ended | mismatches | wall s | CPU s |\n|" + "---|" * 8
        columns = (self.kills, self.in_writes, self.runs, self.mismatches, self.wall, self.cpu)
        rows = [
            (stage, str(processes), *(round(column[stage, processes]) for column in columns)) for stage, processes in self.kills
        ]
        total = ("all", "", *(round(column.total()) for column in columns))
        return "\n".join([head, *(f"| {' | '.join(map(str, row))} |" for row in [*rows, total])])


@pytest.fixture(scope="module")
def tally():
    tally = Tally()
    yield tally
    print(f"\n{tally.table()}")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """What a run leaves that nothing interrupts, and the seconds it takes; each made once."""
    made: dict[tuple[str, Processes], Whole] = {}

    def run_of(stage: str, processes: Processes) -> Whole:
        if (stage, processes) not in made:
            output, began = tmp_path_factory.mktemp("whole") / stage, time.monotonic()
            codes = {wait(pid) for pid in started(stage, processes, world, output)}
            assert codes == {0}, said(output)
            made[stage, processes] = Whole(left(output), time.monotonic() - began)
        return made[stage, processes]

    return run_of


def started(stage: str, processes: Processes, world: Path, output: Path) -> list[int]:
    arguments = flags(stage, world, output, schedule__length=8)
    return start_on(processes.count, stage, arguments, output.with_name("log"), engine=processes.engine)


def said(output: Path) -> str:
    return output.with_name("log").read_text()


def is_half_written(output: Path) -> bool:
    """A checkpoint, or the result."""
    return any(any(output.glob(pattern)) for pattern in ("checkpoints/.*", ".model-*", ".critic-*"))


def kill_until_done(
    stage: str, processes: Processes, world: Path, output: Path, seconds: float, draw: random.Random, tally: Tally
) -> None:
    """Kills a run at random moments, as often as it takes until it ends."""
    here, kills = (stage, processes), 0
    while True:
        pids = started(stage, processes, world, output)
        if kills < AT_MOST:
            time.sleep(draw.uniform(0, seconds))
            for what in (signal.SIGSTOP, signal.SIGKILL):  # all at one moment: none sees another go (that is T7)
                for pid in pids:
                    os.kill(pid, what)
        codes = {wait(pid) for pid in pids}
        if codes == {0}:
            assert [path.name for path in output.iterdir() if path.name.startswith(".")] == [".lock"]
            return
        assert codes <= {0, -signal.SIGKILL}, said(output)
        kills += 1
        tally.kills[here] += 1
        tally.in_writes[here] += is_half_written(output)


def kill_runs(stage: str, processes: Processes, kills: int, world: Path, whole, tmp_path: Path, tally: Tally) -> None:
    """As many runs as it takes."""
    here, expected, draw = (stage, processes), whole(stage, processes), random.Random(f"{stage} {processes}")
    wall, cpu = time.monotonic(), cpu_seconds()
    while tally.kills[here] < kills:
        output = tmp_path / str(tally.runs[here]) / stage
        output.parent.mkdir()
        kill_until_done(stage, processes, world, output, expected.seconds, draw, tally)
        tally.runs[here] += 1
        tally.mismatches[here] += left(output) != expected.leaves
    tally.wall[here] += time.monotonic() - wall
    tally.cpu[here] += cpu_seconds() - cpu
    assert not tally.mismatches[here]


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.mark.parametrize("stage", ["sft", *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES[1:])])
def test_a_killed_run_ends_as_one_that_was_not(stage, world, whole, tmp_path, tally):
    kill_runs(stage, ONE, 1, world, whole, tmp_path, tally)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", SHARES, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_many_kills(stage, processes, world, whole, tmp_path, tally):
    kill_runs(stage, processes, math.ceil(KILLS * SHARES[processes]), world, whole, tmp_path, tally)


@pytest.mark.slow
def test_kills_where_optimizer_state_is_divided(world, whole, tmp_path, tally):
    kill_runs("ppo", DIVIDED, 2, world, whole, tmp_path, tally)


@pytest.mark.slow
def test_no_start_waits_for_a_compiler_that_was_killed(world, tmp_path, monkeypatch):
    """torch compiles behind a lock file; DeepSpeed would do so at its first start on a CPU, and a kill leaves the file."""
    (tmp_path / "extensions" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert {wait(pid, 60) for pid in started("sft", DIVIDED, world, tmp_path / "sft")} == {0}, said(tmp_path / "sft")


@pytest.mark.slow
def test_so_many_were_killed(tally):
    """By the tests above; kills are counted, not trials."""
    assert min(sum(tally.kills[stage, processes] for processes in SHARES) for stage in STAGES) >= KILLS
    assert KILLS * len(STAGES) >= 90
    assert tally.in_writes.total() >= 1
    assert tally.mismatches.total() == 0
