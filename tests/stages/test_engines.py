"""ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2 in two processes: the losses and the weights of one process."""

from __future__ import annotations

import pytest
from harness import ENGINES, flags, left, metrics, run, run_on_two, start_on, wait
from test_equivalence import fixed_rollouts, losses, outcome

from rlhf.models.load import Loading, load_actor, load_scalar

pytestmark = pytest.mark.slow  # two processes each, and DeepSpeed's own start

# A large eps, or Adam would make a whole step of a gradient that is nothing but rounding. Of odd batches one rank has a
# micro-batch less than the other.
MORE = {"schedule__length": 3, "checkpoint__every": 0, "micro_batch_size": 1, "optimizer__eps": 1e-4}

SMALL = {**MORE, "schedule__length": 2, "rollout__batch_size": 6, "ppo__minibatch_size": 3}


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


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
@pytest.mark.parametrize(
    "mode",
    [
        {"roles__mode": "adapters", "lora__rank": 2, "gradient_checkpointing": "true"},
        {"roles__mode": "separate", "lora__rank": 2, "critic": "zero"},
        {"roles__mode": "shared", "critic": "zero"},
    ],
    ids=lambda mode: mode["roles__mode"],
)
def test_every_mode_of_roles_with_a_reward_model(mode, llamas, reward, tmp_path, engine):
    """Frozen roles are divided, too, or are part of what is trained; of odd batches one rank scores once less."""
    log, more = tmp_path / "log", {**SMALL, **mode, "reward": reward}
    if mode["roles__mode"] == "adapters":
        more["critic"] = "null"
    assert run("ppo", flags("ppo", llamas, tmp_path / "one", **more), log, fixed_rollouts) == 0, log.read_text()
    codes = run_on_two("ppo", flags("ppo", llamas, tmp_path / "two", **more), log, fixed_rollouts, engine=engine)
    assert codes == [0, 0], log.read_text()
    found, expected = (losses(metrics(tmp_path / name)) for name in ("two", "one"))
    assert found == [pytest.approx(value, rel=1e-5, abs=1e-6) for value in expected]
    assert len(found) == 6
    roles = [(load_actor, "model"), (load_scalar, "critic")]
    for load, part in roles:
        one, two = (load(str(tmp_path / name / part), Loading()).state_dict() for name in ("one", "two"))
        assert all((one[name] - two[name]).abs().max() < 1e-6 for name in one)


def test_fsdp_in_float64(world, tmp_path):
    log, more = tmp_path / "log", {**SMALL, "precision": "fp64"}
    assert run("ppo", flags("ppo", world, tmp_path / "one", **more), log, fixed_rollouts) == 0, log.read_text()
    codes = run_on_two("ppo", flags("ppo", world, tmp_path / "two", **more), log, fixed_rollouts, engine="fsdp")
    assert codes == [0, 0], log.read_text()
    (lines, weights), (other_lines, other_weights) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert losses(other_lines) == [pytest.approx(value, rel=1e-10, abs=1e-12) for value in losses(lines)]
    assert all((other_weights[name] - weight).abs().max() < 1e-10 for name, weight in weights.items())


@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp"])
def test_four_processes(world, tmp_path, engine):
    log, more = tmp_path / "log", SMALL
    assert run("ppo", flags("ppo", world, tmp_path / "one", **more), log, fixed_rollouts) == 0, log.read_text()
    pids = start_on(4, "ppo", flags("ppo", world, tmp_path / "four", **more), log, fixed_rollouts, engine=engine)
    assert [wait(pid) for pid in pids] == [0] * 4, log.read_text()
    (lines, weights), (other_lines, other_weights) = outcome(tmp_path / "one"), outcome(tmp_path / "four")
    assert losses(other_lines) == [pytest.approx(value, rel=1e-5, abs=1e-6) for value in losses(lines)]
    assert all((other_weights[name] - weight).abs().max() < 1e-6 for name, weight in weights.items())


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(world, tmp_path, engine):
    """Stopped after one step and after two, with a critic warm-up of one: the first checkpoint has no state of the actor."""
    log = tmp_path / "log"
    more = {**SMALL, "ppo__critic_warmup": 1, "schedule__length": 3, "checkpoint__every": 1}

    def go(name: str, **extra: object) -> list[int]:
        return run_on_two("ppo", flags("ppo", world, tmp_path / name, **more, **extra), log, engine=engine)

    assert go("whole") == [0, 0], log.read_text()
    for _ in range(2):
        assert go("stopped", max_hours=1e-9) == [143, 143], log.read_text()
    assert go("stopped") == [0, 0], log.read_text()
    assert "checkpoints/step-1: of step-1, the highest step that verifies" in log.read_text()
    assert "checkpoints/step-2: of step-2, step-1, the highest step that verifies" in log.read_text()
    assert left(tmp_path / "stopped", steps=3) == left(tmp_path / "whole", steps=3)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
@pytest.mark.parametrize(
    "precise", [{"precision": "bf16"}, {"fp8__recipe": "block"}, {"fp8__recipe": "delayed"}], ids=["bf16", "block", "delayed"]
)
def test_in_low_precision_as_under_ddp(llamas, tmp_path, engine, precise):
    """The same micro-batches on as many ranks, so a rounding to few bits falls alike; what differs is the order of sums."""
    log, found = tmp_path / "log", []
    for name in ("ddp", engine):
        arguments = flags("ppo", llamas, tmp_path / name, **SMALL, **precise)
        assert run_on_two("ppo", arguments, log, fixed_rollouts, engine=name) == [0, 0], log.read_text()
        found.append(losses(metrics(tmp_path / name)))
    assert len(found[0]) == 6
    assert found[1] == [pytest.approx(value, rel=1e-3, abs=1e-4) for value in found[0]]


def second_loss_is_nan(module) -> None:
    plain, calls = module.sft_loss, []

    def loss(*arguments):
        calls.append(1)
        value = plain(*arguments)
        return value * float("nan") if len(calls) == 2 else value

    module.sft_loss = loss


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_is_not_finite_ends_the_run(world, tmp_path, engine):
    log, more = tmp_path / "log", {**MORE, "data__eval": "null", "micro_batch_size": 9}
    codes = run_on_two("sft", flags("sft", world, tmp_path / "run", **more), log, second_loss_is_nan, engine=engine)
    assert codes == [1, 1], log.read_text()
    assert "step 2: loss is nan on rank 0 and 1" in log.read_text()


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_logits_in_parts(world, tmp_path, engine):
    """Ranks read at different numbers of places, and must ask each other for weights equally often."""

    def one_place_at_once(_) -> None:
        from rlhf.models import trunk

        trunk.LOGITS_AT_ONCE = 1

    log, more = tmp_path / "log", {**MORE, "data__eval": "null"}
    for name, change in (("whole", None), ("parts", one_place_at_once)):
        codes = run_on_two("sft", flags("sft", world, tmp_path / name, **more), log, change, engine=engine)
        assert codes == [0, 0], log.read_text()
    whole, parts = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-5)
