"""`--profile`: what it leaves, and that it changes nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from harness import before_each_step, flags, left, run

from rlhf.training.profiling import Profiler


def stop_before_the_last(train) -> None:
    if train.step_done == 3:
        raise RuntimeError("killed")


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_profiled_run_is_the_same_to_the_bit_and_goes_on_after_a_kill(stage, world, tmp_path):
    log, plain, other = tmp_path / "log", tmp_path / "plain", tmp_path / "other"
    arguments = [*flags(stage, world, other), "--profile"]
    assert run(stage, flags(stage, world, plain), log) == 0, log.read_text()
    assert run(stage, arguments, log, before_each_step(stop_before_the_last)) == 70
    trace = json.loads((other / "profile" / "trace.json").read_text())["traceEvents"]
    phases = {event["name"] for event in trace if event["name"].startswith("phase: ")}
    assert phases == ({"phase: rollout", "phase: score", "phase: update"} if stage == "ppo" else set())
    table = (other / "profile" / "profile.txt").read_text()
    assert table.startswith(f"step 3 of {stage} under torch.profiler")
    assert table.splitlines()[2] in log.read_text()  # the console has it too
    assert run(stage, arguments, log) == 0, log.read_text()
    assert "no profile: step 3 of a start" in log.read_text()  # the second start took one step
    assert left(other, 4) == left(plain, 4)


def test_a_profile_that_changed_a_weight_would_be_seen(world, tmp_path):
    log, plain, other = tmp_path / "log", tmp_path / "plain", tmp_path / "other"

    def change(module) -> None:
        right = Profiler.end

        def end(profiler, step: int) -> None:
            if profiler.running:
                with torch.no_grad():
                    next(profiler.train.policy.parameters()).add_(1e-3)
            right(profiler, step)

        Profiler.end = end  # in the fork

    assert run("sft", flags("sft", world, plain), log) == 0, log.read_text()
    assert run("sft", [*flags("sft", world, other), "--profile"], log, change) == 0, log.read_text()
    assert left(other, 4) != left(plain, 4)
