"""A loss, gradient, score, KL or advantage that is not finite never reaches the optimizer, on whichever rank it arises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from broken import Fault, in_advantage, in_kl, in_loss, in_score, infinite_gradient
from harness import flags, metrics, run, start_on, wait
from safetensors.torch import load_file

from rlhf.functional.masked import Moments
from rlhf.training.accumulation import rank_of_rows, scoring_micro_batches

STEPS, FAULT = 4, 2
"""The third step of four meets the fault: metrics and messages count from 1."""

MORE = {"schedule__length": STEPS, "checkpoint__keep": 9, "micro_batch_size": 9, "data__eval": "null"}


# The NaN of the first is added, so that the gradient of the loss itself is finite; infinity times a loss is infinite in both.
CASES = {
    "sft-loss": ("sft", "loss", in_loss(lambda loss: loss + math.nan)),
    "sft-gradient": ("sft", "gradient norm", in_loss(infinite_gradient)),
    "rm-loss": ("rm", "loss", in_loss(lambda loss: loss * math.inf)),
    "rm-gradient": ("rm", "gradient norm", in_loss(infinite_gradient)),
    "ppo-loss": ("ppo", "loss", in_loss(lambda loss: loss * math.nan)),
    "ppo-gradient": ("ppo", "gradient norm", in_loss(infinite_gradient)),
    "ppo-score": ("ppo", "score", in_score),
    "ppo-KL": ("ppo", "KL", in_kl),
    "ppo-advantage": ("ppo", "advantage", in_advantage),
}
FILES = {"sft": "sft.jsonl", "rm": "pairs.jsonl", "ppo": "prompts.jsonl"}


def go(processes: int, stage: str, arguments: list[str], log: Path, fault=None, engine: str = "ddp") -> set[int]:
    """Exit codes."""
    return {wait(pid) for pid in start_on(processes, stage, arguments, log, fault, engine=engine)}


def clean_runs(processes: int, world: Path, directory: Path) -> dict[str, Path]:
    for stage in FILES:
        assert go(processes, stage, flags(stage, world, directory / stage, **MORE), directory / "log") == {0}
    return {stage: directory / stage for stage in FILES}


@pytest.fixture(scope="module")
def clean(world, tmp_path_factory):
    return clean_runs(1, world, tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def clean_on_two(world, tmp_path_factory):
    return clean_runs(2, world, tmp_path_factory.mktemp("clean"))


def contents(directory: Path) -> dict[str, bytes]:
    assert directory.is_dir()
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def results(output: Path, steps: int = STEPS) -> dict[str, object]:
    found = {part: contents(output / part) for part in ("model", f"checkpoints/step-{steps}")}
    return {**found, "metrics": metrics(output)}


def dump(output: Path, step: int = FAULT + 1) -> dict:
    return json.loads((output / "non_finite" / f"step-{step}.json").read_text())


def require_finite_lines(output: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"metrics.jsonl has {word}")

    for line in (output / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def require_its_rows(case: str, processes: int, world: Path, output: Path, action: str) -> None:
    """The dump names what was broken and has the rows that were in the broken place, as the data file has them."""
    stage, quantity, _ = CASES[case]
    [refusal] = dump(output)["refusals"]
    assert (refusal["quantity"], refusal["action"]) == (quantity, action)
    broken = {part["rank"]: part for part in refusal["ranks"] if part["rows"]}
    everywhere = quantity == "gradient norm"
    assert set(broken) == (set(range(processes)) if everywhere else {processes - 1})
    assert all(value in ("nan", "inf", "-inf") for part in broken.values() for value in part["values"])
    rows = [row for part in broken.values() for row in part["rows"]]
    lines = (world / FILES[stage]).read_text().splitlines()
    for row in rows:
        place, _, rest = row["where"].partition(", ")
        path, _, number = place.rpartition(":")
        assert path == str(world / FILES[stage])
        if stage == "ppo":
            assert row["prompt"] == json.loads(lines[int(number) - 1])["prompt"]
            assert rest.endswith("scored by count:a")
            assert row["reply_ids"]
    if quantity in ("score", "KL", "advantage"):
        assert len(rows) == 1
    elif stage != "ppo":
        of_batch = 9 if everywhere else len(range(processes - 1, 9, processes))
        assert len(rows) == of_batch == len({row["where"] for row in rows})
    if quantity == "score":
        assert rows[0]["score"] == "nan"
    if quantity == "KL":
        assert rows[0]["kl"] == "inf"


def ends_the_run(case: str, processes: int, world: Path, clean: dict[str, Path], directory: Path, engine: str = "ddp") -> None:
    stage, quantity, break_ = CASES[case]
    output, log, arguments = directory / "run", directory / "log", flags(stage, world, directory / "run", **MORE)
    fault = Fault(break_, [FAULT], rank=processes - 1)
    assert go(processes, stage, arguments, log, fault, engine) == {1}, log.read_text()
    said = log.read_text()
    assert f"step 3: {quantity} is " in said
    if quantity != "gradient norm":
        assert f" on rank {processes - 1} ({world}/{FILES[stage]}:" in said
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert f"step 3: {quantity} is " in status["reason"]
    require_its_rows(case, processes, world, output, "abort")
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert contents(output / "checkpoints" / "step-2") == contents(clean[stage] / "checkpoints" / "step-2")
    assert metrics(output) == metrics(clean[stage])[:FAULT]
    assert go(processes, stage, arguments, log, engine=engine) == {0}, log.read_text()
    assert results(output) == results(clean[stage])


def is_skipped(case: str, processes: int, world: Path, clean: dict[str, Path], directory: Path) -> None:
    stage, _, break_ = CASES[case]
    log, more = directory / "log", {**MORE, "non_finite__action": "skip"}
    output, stopped = directory / "run", directory / "stopped"

    def arguments(to: Path, **extra: object) -> list[str]:
        return flags(stage, world, to, **more, **extra)

    def fault() -> Fault:
        return Fault(break_, [FAULT], rank=processes - 1)

    assert go(processes, stage, arguments(output), log, fault()) == {0}, log.read_text()
    assert "skipped, 1 in a row (3 are allowed)" in log.read_text()
    require_finite_lines(output)
    require_its_rows(case, processes, world, output, "skip")
    lines, expected = metrics(output), metrics(clean[stage])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:FAULT] == expected[:FAULT]
    assert [line.get("optimizer/skipped") for line in lines] == [None, None, 1.0, None]
    assert lines[3]["optimizer/lr"] == expected[3]["optimizer/lr"]  # the schedule went on
    assert stage == "ppo" or lines[3]["tokens"] == expected[3]["tokens"]  # and so did the order of the data
    before, after = (output / "checkpoints" / f"step-{step}" for step in (2, 3))
    of_an_update = stage == "ppo" and case in ("ppo-loss", "ppo-gradient")  # others of the iteration were taken
    for name in ("model", "optimizer"):
        same = (before / f"{name}.safetensors").read_bytes() == (after / f"{name}.safetensors").read_bytes()
        assert same != of_an_update
    counted = [json.loads((output / f"checkpoints/step-{step}/state.json").read_text())["non_finite"] for step in (2, 3, 4)]
    assert counted == [{"in_a_row": n} for n in ((0, 0, 0) if of_an_update else (0, 1, 0))]
    # stopped after each step, the skipped one, too, and gone on with
    for _ in range(STEPS - 1):
        assert go(processes, stage, arguments(stopped, max_hours=1e-9), log, fault()) == {143}, log.read_text()
    assert go(processes, stage, arguments(stopped), log, fault()) == {0}, log.read_text()
    assert results(stopped) == results(output)


@pytest.mark.parametrize("case", CASES)
def test_it_ends_the_run(case, world, clean, tmp_path):
    ends_the_run(case, 1, world, clean, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_ends_the_run_of_two_processes(case, world, clean_on_two, tmp_path):
    ends_the_run(case, 2, world, clean_on_two, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_skipped(case, world, clean, tmp_path):
    is_skipped(case, 1, world, clean, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_skipped_by_two_processes(case, world, clean_on_two, tmp_path):
    is_skipped(case, 2, world, clean_on_two, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("case", ["sft-loss", "sft-gradient", "ppo-loss", "ppo-score"])
def test_every_engine_skips_as_ddp_does(case, engine, world, tmp_path):
    """The same rounding but for the order of sums; a large eps, or Adam makes a whole step of it."""
    stage, _, break_ = CASES[case]
    more, log, found = {**MORE, "non_finite__action": "skip", "optimizer__eps": 1e-4}, tmp_path / "log", []
    for name in ("ddp", engine):
        fault, arguments = Fault(break_, [FAULT], rank=1), flags(stage, world, tmp_path / name, **more)
        assert go(2, stage, arguments, log, fault, name) == {0}, log.read_text()
        require_its_rows(case, 2, world, tmp_path / name, "skip")
        weights = [load_file(path) for path in sorted((tmp_path / name / "checkpoints").glob("step-*/model.safetensors"))]
        found.append((metrics(tmp_path / name), weights))
    (lines, weights), (others, other_weights) = found
    assert [line.get("optimizer/skipped") for line in others] == [None, None, 1.0, None]
    assert others == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in lines]
    for one, other in zip(weights, other_weights, strict=True):
        assert all((one[name] - other[name]).abs().max() < 1e-5 for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "fsdp"])
def test_every_engine_leaves_the_last_checkpoint(engine, world, tmp_path):
    more, log = flags("sft", world, tmp_path / "clean", **MORE), tmp_path / "log"
    assert go(2, "sft", more, log, engine=engine) == {0}, log.read_text()
    ends_the_run("sft-loss", 2, world, {"sft": tmp_path / "clean"}, tmp_path, engine)


@pytest.mark.parametrize("stopped", [False, True], ids=["at once", "stopped between"])
def test_too_many_in_a_row_are_an_error(stopped, world, clean, tmp_path):
    """Steps 2 and 3 are skipped, and step 4 may not be; a checkpoint remembers how many there were."""
    log, output = tmp_path / "log", tmp_path / "run"
    more = {**MORE, "non_finite__action": "skip", "non_finite__max_consecutive": 2}
    steps, break_ = range(1, STEPS), CASES["sft-loss"][2]
    for _ in range(3 if stopped else 0):
        arguments = flags("sft", world, output, **more, max_hours=1e-9)
        assert run("sft", arguments, log, Fault(break_, steps)) == 143, log.read_text()
    assert run("sft", flags("sft", world, output, **more), log, Fault(break_, steps)) == 1, log.read_text()
    assert "3 in a row, non_finite.max_consecutive is 2" in log.read_text()
    assert [line.get("optimizer/skipped") for line in metrics(output)] == [None, 1.0, 1.0]
    assert dump(output, 4)["refusals"][0]["action"] == "abort"
    assert not (output / "model").exists()
    # the fault is gone: the same command goes on
    assert run("sft", flags("sft", world, output, **more), log) == 0, log.read_text()


def test_a_run_that_ended_may_go_on_by_skipping(world, tmp_path):
    log, break_ = tmp_path / "log", CASES["sft-loss"][2]
    skip = {"non_finite__action": "skip"}
    assert run("sft", flags("sft", world, tmp_path / "run", **MORE), log, Fault(break_, [FAULT])) == 1
    assert run("sft", flags("sft", world, tmp_path / "run", **MORE, **skip), log, Fault(break_, [FAULT])) == 0, log.read_text()
    assert run("sft", flags("sft", world, tmp_path / "skips", **MORE, **skip), log, Fault(break_, [FAULT])) == 0
    assert results(tmp_path / "run") == results(tmp_path / "skips")
    assert [line.get("optimizer/skipped") for line in metrics(tmp_path / "run")] == [None, None, 1.0, None]


def test_scales_of_fp8_know_nothing_of_it(llamas, tmp_path):
    """A magnitude of infinity in the history of delayed scaling would hold every scale for as long as that is."""
    log, output = tmp_path / "log", tmp_path / "run"
    more = {**MORE, "fp8__recipe": "delayed", "fp8__amax_history": 3, "non_finite__action": "skip"}
    fault = Fault(in_loss(infinite_gradient), [FAULT])
    assert run("sft", flags("sft", llamas, output, **more), log, fault) == 0, log.read_text()
    states = [load_file(output / "checkpoints" / f"step-{step}" / "fp8.safetensors") for step in (2, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert all(tensor.isfinite().all() for state in states for tensor in state.values())


@pytest.fixture(params=["function", "model"])
def source(request, tmp_path):
    """A reward of a user's, or of a model, with a NaN among its second scores: with no evaluation, those of step 2."""
    if request.param == "function":
        text = "calls = []\ndef mine(responses):\n    calls.append(1)\n    bad = len(calls) == 2\n"
        text += "    return [float('nan') if bad and i == 3 else 1.0 * len(r) for i, r in enumerate(responses)]\n"
        (tmp_path / "mine.py").write_text(text)
        return f"{tmp_path}/mine.py:mine", None
    from rlhf.models.roles import RewardModel

    def broken(module) -> None:
        plain, calls = RewardModel.scores, []

        def scores(self, batch):
            calls.append(1)
            found = plain(self, batch)
            if len(calls) == 3:  # two micro-batches of fourteen replies each time
                found[0] = math.nan
            return found

        RewardModel.scores = scores  # type: ignore[method-assign]

    return request.getfixturevalue("reward"), broken


@pytest.mark.parametrize("action", ["abort", "skip"])
def test_whoever_scores(source, action, llamas, tmp_path):
    place, broken = source
    log, output = tmp_path / "log", tmp_path / "run"
    more = {**MORE, "reward": place, "schedule__length": 3, "non_finite__action": action, "reward__normalize": "running"}
    code = run("ppo", flags("ppo", llamas, output, **more, kl__controller="adaptive"), log, broken)
    assert code == (1 if action == "abort" else 0), log.read_text()
    assert f"scored by {place})" in log.read_text()
    assert "step 2: score is nan on rank 0" in log.read_text()
    if action == "skip":
        require_finite_lines(output)
        assert [line.get("optimizer/skipped") for line in metrics(output)] == [None, 1.0, None]
        state = json.loads((output / "checkpoints" / "step-3" / "state.json").read_text())
        assert state["running"]["count"] == 3 * 14 - 1
        assert math.isfinite(state["kl"]["coef"])
        assert math.isfinite(state["running"]["m2"])


@pytest.mark.parametrize("action", ["abort", "skip"])
def test_an_evaluation_that_is_not_finite(action, world, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(responses):\n    return [float('inf')] + [1.0] * (len(responses) - 1)\n")
    log, output = tmp_path / "log", tmp_path / "run"
    more = {"eval__scorers": f"{tmp_path}/mine.py:mine", "schedule__length": 1, "non_finite__action": action}
    code = run("ppo", flags("ppo", world, output, **more), log)
    assert "evaluation after step 0: eval/mine is inf" in log.read_text()
    assert code == (1 if action == "abort" else 0), log.read_text()
    if action == "skip":
        require_finite_lines(output)
        assert "Infinity" not in (output / "samples.jsonl").read_text()
        assert "mine" not in json.loads((output / "run.json").read_text())["result"]["after"]


def test_who_has_a_row():
    """Fourteen rows in minibatches of seven, on three ranks: what they are scored by."""
    expected = [0, 1, 2, 0, 1, 2, 0] * 2
    assert rank_of_rows(14, 7, 3) == expected
    for rank in range(3):
        rows = [row for micro in scoring_micro_batches(14, 7, 2, rank, 3) if micro.weight for row in micro.items]
        assert all(expected[row] == rank for row in rows)


def test_moments_leave_out_what_is_not_finite():
    scores = torch.tensor([1.0, math.nan, 3.0, math.inf])
    moments = Moments.of(scores, scores.isfinite())
    assert (moments.count, moments.mean, moments.variance) == (2, 2.0, 1.0)


def test_a_loss_too_large_for_its_exponential(world, tmp_path):
    """Its perplexity is infinite, which is for the run to judge."""

    def huge(module) -> None:
        right = module.sft_loss

        module.sft_loss = lambda logprobs: 1000 * right(logprobs)

    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft", schedule__length=1), log, huge) == 1
    assert "eval/perplexity is inf" in log.read_text()
