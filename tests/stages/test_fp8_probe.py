"""A run in FP8 that compares itself with a span without: the span changes nothing, and replaces the run's own where it must."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from harness import flags, left, metrics, run, start, start_on, wait

from rlhf.training.fp8 import span
from rlhf.training.fp8.span import compare

PROBED = {"schedule__length": 8, "fp8__recipe": "delayed", "fp8__probe__every": 4, "fp8__probe__steps": 2}


def steps(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "optimizer/lr" in line]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_probe_changes_nothing_of_the_run(stage, llamas, tmp_path):
    log = tmp_path / "log"
    assert run(stage, flags(stage, llamas, tmp_path / "probed", **PROBED), log) == 0, log.read_text()
    assert run(stage, flags(stage, llamas, tmp_path / "plain", **{**PROBED, "fp8__probe__every": 0}), log) == 0
    assert left(tmp_path / "probed") == left(tmp_path / "plain")
    without = flags(stage, llamas, tmp_path / "without", **{**PROBED, "fp8__recipe": "none"})
    assert run(stage, without, log) == 0, log.read_text()
    first = tmp_path / "probed" / "fp8_probe" / "step-0"
    assert steps(metrics(first)) == steps(metrics(tmp_path / "without"))[:2]  # the span is a run without FP8
    verdict = json.loads((first / "verdict.json").read_text())
    name = verdict["metric"]
    assert name == ("loss" if stage == "sft" else "reward/score")
    own = [line[name] for line in steps(metrics(tmp_path / "probed"))[:2]]
    assert verdict["fp8"] == pytest.approx(sum(own) / 2)
    assert verdict["kept"] == "in FP8"
    assert (tmp_path / "probed" / "fp8_probe" / "step-4" / "verdict.json").exists()
    assert log.read_text().count("FP8 probe of steps") == 2
    said = log.read_text().count("scored alone and together")  # of the FP8 steps only, twice in ppo: probed and plain
    assert said == (2 if stage == "ppo" else 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_too_large_a_gap_falls_back(processes, llamas, tmp_path, monkeypatch):
    """With a bound of nothing every gap is too large: the run is then one without FP8 in all its spans."""
    monkeypatch.setattr(span, "RELATIVE", 0.0)
    monkeypatch.setattr(span, "STANDARD_ERRORS", 0.0)
    log = tmp_path / "log"
    always = {**PROBED, "fp8__recipe": "block", "fp8__probe__every": 2, "fp8__probe__fallback": "true"}
    pids = start_on(processes, "sft", flags("sft", llamas, tmp_path / "probed", **always), log)
    assert [wait(pid) for pid in pids] == [0] * processes, log.read_text()
    pids = start_on(processes, "sft", flags("sft", llamas, tmp_path / "plain", schedule__length=8), log)
    assert [wait(pid) for pid in pids] == [0] * processes, log.read_text()
    assert "TOO LARGE; goes on without FP8" in log.read_text()
    probed, plain = left(tmp_path / "probed"), left(tmp_path / "plain")
    weights = [name for name in plain if name.endswith("safetensors")]
    assert weights
    assert all(probed[name] == plain[name] for name in weights)
    assert steps(metrics(tmp_path / "probed")) == steps(metrics(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("stage", "fallback"),
    [("sft", "false"), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("sft", "true"), ("ppo", "false")))],
)
def test_killed_inside_a_span_it_begins_the_span_again(stage, fallback, llamas, tmp_path):
    log, settings = tmp_path / "log", {**PROBED, "fp8__probe__steps": 4, "fp8__probe__fallback": fallback}
    assert run(stage, flags(stage, llamas, tmp_path / "whole", **settings), log) == 0, log.read_text()
    output = tmp_path / "killed"
    for sent, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        pid = start(stage, flags(stage, llamas, output, **settings), log)
        place = output / "fp8_probe" / "step-0" / "metrics.jsonl"
        while not place.exists() or not place.read_text():
            time.sleep(0.005)
        os.kill(pid, sent)
        assert wait(pid) == code, log.read_text()
        place.unlink()
    assert run(stage, flags(stage, llamas, output, **settings), log) == 0, log.read_text()
    assert left(output) == left(tmp_path / "whole")


def series(*values: float) -> list[dict[str, float]]:
    return [{"loss": value} for value in values]


@pytest.mark.parametrize(
    ("fp8", "within"),
    [
        (series(2.0, 2.0, 2.0, 2.0), True),
        (series(2.003, 2.004, 2.003, 2.004), True),  # 0.0035 of 2 is less than 0.2%
        (series(2.01, 2.011, 2.01, 2.011), False),
        (series(2.2, 1.9, 2.1, 1.85), True),  # a gap of 0.0125 with a standard error of 0.08
    ],
)
def test_the_verdict(fp8, within):
    verdict = compare(series(2.0, 2.0, 2.0, 2.0), fp8, fallback=True)
    assert verdict.within == within
    assert verdict.kept == ("in FP8" if within else "without FP8")


def test_spans_must_fit(llamas, tmp_path):
    log = tmp_path / "log"
    assert run("sft", flags("sft", llamas, tmp_path / "a", **{**PROBED, "fp8__probe__steps": 5}), log) == 78
    assert "steps 5 must be at most every 4" in log.read_text()
