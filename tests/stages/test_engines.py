"""ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2 in two processes: the losses and the weights of one process."""

from __future__ import annotations

import pytest
from harness import ENGINES, flags, run, run_on_two
from test_equivalence import fixed_rollouts, losses, outcome
from test_resume import left

pytestmark = pytest.mark.slow  # two processes each, and DeepSpeed's own start

# A large eps, or Adam would make a whole step of a gradient that is nothing but rounding. Of odd batches one rank has a
# micro-batch less than the other.
MORE = {"schedule__length": 3, "checkpoint__every": 0, "micro_batch_size": 1, "optimizer__eps": 1e-4}


@pytest.fixture(scope="module", params=["sft", "rm", "ppo"])
def case(request, world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("engines")
    log = directory / "log"
    assert run(request.param, flags(request.param, world, directory / "one", **MORE), log, fixed_rollouts) == 0, log.read_text()
    return request.param, directory


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_two_processes_leave_what_one_leaves(case, world, engine):
    stage, directory = case
    log, output = directory / f"{engine}.log", directory / engine
    codes = run_on_two(stage, flags(stage, world, output, **MORE), log, fixed_rollouts, engine=engine)
    assert codes == [0, 0], log.read_text()
    (expected_lines, expected), (lines, weights) = outcome(directory / "one"), outcome(output)
    assert len(lines) == 3
    assert losses(lines) == [pytest.approx(value, rel=1e-5, abs=1e-6) for value in losses(expected_lines)]
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        assert (weights[name] - weight).abs().max() < 1e-6, name


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(world, tmp_path, engine):
    """Stopped after one step and after two, with a critic warm-up of one: the first checkpoint has no state of the actor."""
    log = tmp_path / "log"
    more = {"micro_batch_size": 2, "ppo__critic_warmup": 1, "schedule__length": 3}

    def go(name: str, **extra: object) -> list[int]:
        return run_on_two("ppo", flags("ppo", world, tmp_path / name, **more, **extra), log, engine=engine)

    assert go("whole") == [0, 0], log.read_text()
    for _ in range(2):
        assert go("stopped", max_hours=1e-9) == [143, 143], log.read_text()
    assert go("stopped") == [0, 0], log.read_text()
    assert "(1 steps done)" in log.read_text()
    assert "(2 steps done)" in log.read_text()
    assert left(tmp_path / "stopped", steps=3) == left(tmp_path / "whole", steps=3)
