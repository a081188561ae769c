"""Whole runs with several rewards, replies without a score, and columns of the data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from harness import flags, left, metrics, run, start_on, wait

MINE = """
def lengths(responses, answer):
    return [float(len(r) - len(a)) for r, a in zip(responses, answer)]

def picky(responses):
    return [None if "h" in r else 1.0 for r in responses]

def nothing(responses):
    return [None] * len(responses)
"""


@pytest.fixture
def rows(world, tmp_path) -> Path:
    lines = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    answered = [{**row, "answer": row["prompt"].split()[0], "note": number} for number, row in enumerate(lines)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "rows.jsonl"


def several(world, tmp_path, output: str, rows: Path, **more) -> list[str]:
    sources = {
        "reward__sources__count__source": "count:a", "reward__sources__count__weight": 0.5,
        "reward__sources__picky__source": f"{tmp_path}/mine.py:picky",
        "reward__sources__lengths__source": f"{tmp_path}/mine.py:lengths", "reward__sources__lengths__weight": -0.1,
        "reward__sources__right__source": "verify:exact", "reward__sources__rm__source": world / "critic",
    }  # fmt: skip
    plain = {"data": rows, "data__eval": rows, "schedule__length": 3, "reward__normalize": "running"}
    plain |= {"data__extra_columns": "ignore", **sources, **more}
    return [flag for flag in flags("ppo", world, tmp_path / output, **plain) if not flag.startswith("--reward=")]


def test_several_sources(world, rows, tmp_path):
    log = tmp_path / "log"
    assert run("ppo", several(world, tmp_path, "run", rows), log) == 0, log.read_text()
    steps = [line for line in metrics(tmp_path / "run") if "reward/score" in line]
    assert len(steps) == 3
    for line in steps:
        for name in ("count", "picky", "lengths", "right", "rm"):
            assert f"reward/{name}" in line
            assert f"reward/{name}_std" in line
        assert line["reward/picky"] == 1.0
        assert 0 < line["reward/masked"] < 14  # the tiny world says `h` in some replies, not in all
        assert math.isfinite(line["policy/loss"])
    assert "eval/right" in metrics(tmp_path / "run")[0]
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    assert inputs["reward.sources.rm.source"]["digest"]
    assert inputs["reward.sources.lengths.source"]["digest"]


def test_a_column_nobody_has(world, rows, tmp_path):
    log, lines = tmp_path / "log", rows.read_text().splitlines()
    lines[4] = json.dumps({"prompt": "a b", "note": 1})
    rows.write_text("\n".join(lines) + "\n")
    assert run("ppo", several(world, tmp_path, "run", rows), log) == 65
    assert f"{rows}:5: answer is missing, which" in log.read_text()
    refused = several(world, tmp_path, "run", rows, data__extra_columns="fail")
    assert run("ppo", refused, log) == 65
    assert "unknown column 'note'" in log.read_text()  # and not `answer`, which is asked for


def test_no_reply_has_a_score(world, rows, tmp_path):
    """Nothing is learned: the weights stay as they were, to the bit."""
    log = tmp_path / "log"
    arguments = flags("ppo", world, tmp_path / "run", reward=f"{tmp_path}/mine.py:nothing", schedule__length=2)
    assert run("ppo", arguments, log) == 0, log.read_text()
    assert "step 2: no reply has a score; the update is left out" in log.read_text()
    steps = [line for line in metrics(tmp_path / "run") if "reward/masked" in line]
    assert [line["reward/masked"] for line in steps] == [14.0, 14.0]
    assert all("reward/score" not in line and "policy/loss" not in line for line in steps)
    from safetensors.torch import load_file

    before, after = (load_file(place / "model.safetensors") for place in (world / "model", tmp_path / "run" / "model"))
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.slow
def test_several_sources_in_two_processes_and_after_a_stop(world, rows, tmp_path):
    log, precise = tmp_path / "log", {"precision": "fp64"}
    assert run("ppo", several(world, tmp_path, "one", rows, **precise), log) == 0, log.read_text()
    codes = [wait(pid) for pid in start_on(2, "ppo", several(world, tmp_path, "two", rows, **precise), log)]
    assert codes == [0, 0], log.read_text()
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-6)  # a score is a float32, whatever computes it

    def breaks(module) -> None:
        right, calls = module.credit, []

        def credit(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return right(*arguments)

        module.credit = credit

    assert run("ppo", several(world, tmp_path, "again", rows, **precise), log, breaks) != 0
    assert run("ppo", several(world, tmp_path, "again", rows, **precise), log) == 0, log.read_text()
    assert left(tmp_path / "one", 3) == left(tmp_path / "again", 3)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_an_answer_that_no_verifier_can_read_is_found_at_the_start(stage, world, rows, tmp_path):
    """The last row, which this short run would not sample."""
    lines = [json.loads(line) | {"answer": 7} for line in rows.read_text().splitlines()]
    lines[-1]["answer"] = "none at all"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = {"data": rows, "data__eval": "null", "data__extra_columns": "ignore", "schedule__length": 1}
    log = tmp_path / "log"
    assert run(stage, flags(stage, world, tmp_path / "run", reward="verify:numeric", **more), log) == 65
    assert f"rows.jsonl:{len(lines)}: the answer 'none at all' is no number" in log.read_text()
