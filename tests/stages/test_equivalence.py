"""One process or two, micro-batches of four or of thirty-two: the same global batch gives the same losses and weights.

In PPO the rollouts are fixed (made by a rule, not sampled): a decode in other company rounds differently, and one flipped
token is another experiment.
"""

from __future__ import annotations

import pytest
import torch
from harness import flags, metrics, run, run_on_two
from safetensors.torch import load_file

from rlhf.rollout.engines import Samples

STAGES = ("sft", "rm", "dpo", "kto", "ppo")


class RuleEngine:
    """Replies that follow from the prompt and the row's seed alone."""

    def __init__(self, *_) -> None: ...

    def sync(self, weights, version) -> None: ...

    def generate(self, prompts, sampling, row_seeds) -> Samples:
        replies = [[2 + (seed + i) % 8 for i in range(1 + seed % 5)] + [1] * (seed % 3 > 0) for seed in row_seeds]
        zeros = [[0.0] * len(reply) for reply in replies]
        return Samples(list(prompts), replies, zeros, [reply[-1] == 1 for reply in replies], 0)


def fixed_rollouts(module) -> None:
    if hasattr(module, "open_engine"):
        module.open_engine = RuleEngine
        from rlhf.training import invariants

        invariants.ROLLOUT_TOLERANCE = dict.fromkeys(invariants.ROLLOUT_TOLERANCE, 1e9)  # nothing was sampled here


def outcome(output) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = [line for line in metrics(output) if "optimizer/grad_norm" in line]
    weights = {}
    for part in ("model", "critic"):
        if (output / part).exists():
            weights |= {f"{part}.{k}": v for k, v in load_file(output / part / "model.safetensors").items()}
    return lines, weights


def losses(lines: list[dict]) -> list[float]:
    return [
        line[name] for line in lines for name in ("loss", "policy/loss", "value/loss", "optimizer/grad_norm") if name in line
    ]


@pytest.fixture(scope="module", params=[(s, p) for s in STAGES for p in ("fp64", "fp32")], ids=lambda p: "-".join(p))
def case(request, world, tmp_path_factory):
    """(stage, precision, runner, the outcome of one process with micro-batches of 32)"""
    stage, precision = request.param
    directory = tmp_path_factory.mktemp("equivalence")

    def arguments(name: str, micro: int) -> list[str]:
        more = {"schedule__length": 3, "checkpoint__every": 0, "precision": precision, "micro_batch_size": micro}
        return flags(stage, world, directory / name, **more)

    log = directory / "log"
    assert run(stage, arguments("reference", 32), log, fixed_rollouts) == 0, log.read_text()
    return stage, precision, directory, arguments, outcome(directory / "reference")


def assert_equal(case, name: str) -> None:
    _, precision, directory, _, (lines, weights) = case
    other_lines, other_weights = outcome(directory / name)
    assert len(lines) == 3
    tolerance = {"rel": 1e-10, "abs": 1e-12} if precision == "fp64" else {"rel": 1e-5, "abs": 1e-6}
    assert losses(other_lines) == [pytest.approx(value, **tolerance) for value in losses(lines)]
    if precision == "fp64":
        for key, value in weights.items():
            assert (value - other_weights[key]).abs().max() < 1e-10, key


def test_micro_batches_of_four(case):
    stage, _, directory, arguments, _ = case
    log = directory / "log"
    assert run(stage, arguments("micro", 4), log, fixed_rollouts) == 0, log.read_text()
    assert_equal(case, "micro")


def test_two_processes(case):
    stage, _, directory, arguments, _ = case
    log = directory / "log"
    assert run_on_two(stage, arguments("two", 4), log, fixed_rollouts) == [0, 0], log.read_text()
    assert_equal(case, "two")
