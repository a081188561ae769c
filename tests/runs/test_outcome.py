"""What a stage says as it ends: the figures are those of metrics.jsonl, written by hand here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf import paths
from rlhf.cli import main
from rlhf.config.parse import parse
from rlhf.runs.outcome import next_command, outcome


@pytest.mark.parametrize(
    ("stage", "records", "said"),
    [
        ("sft", [{"eval/loss": 2.0551}, {"loss": 3.0}, {"eval/loss": 2.5}, {"eval/loss": 2.0104}], "eval/loss 2.055 -> 2.01"),
        ("sft", [{"loss": 3.0}, {"loss": 1.5}], "loss 3 -> 1.5"),
        ("sft", [{"loss": 3.0}, {"eval/loss": 2.5}], "eval/loss 2.5"),
        (
            "rm",
            [{"loss": 0.6}, {"eval/accuracy": 0.77, "eval/accuracy_low": 0.68, "eval/accuracy_high": 0.841}],
            "eval/accuracy 0.77 (95%: 0.680 to 0.841)",
        ),
        ("ppo", [{"eval/score": 0.09}, {"reward/score": 7.0}, {"eval/score": 0.45}], "eval/score 0.09 -> 0.45"),
        ("grpo", [{"reward/score": -0.5}, {"reward/score": 0.5}, {"reward/score": 1.25}], "reward/score -0.5 -> 1.25"),
        ("kto", [{"tokens": 5}], ""),
    ],
)
def test_the_first_and_the_last_figure(tmp_path: Path, stage: str, records: list[dict[str, float]], said: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"stage": stage}))
    lines = [json.dumps({"step": step, **record}) + "\n" for step, record in enumerate(records)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert outcome(tmp_path) == f"done: {tmp_path / 'model'}" + (f"; {said}" if said else "")


def test_it_is_said_once_and_with_what_is_next(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command, end in [
        ("sft", "sft: done: sft/model\nsft: next: rlhf rm --config rm.yaml --model sft --data PAIRS\n"),
        ("rm", "rm: done: rm/model\nrm: next: rlhf ppo --config ppo.yaml --actor sft --reward rm --data PROMPTS\n"),
        ("ppo", "ppo: done: ppo/model\nppo: next: rlhf report ppo\n"),
    ]:
        assert main([command, "--config", f"{command}.yaml"]) == 0
        said = capfd.readouterr().out
        assert said.endswith(end)
    assert main(["ppo", "--config", "ppo.yaml"]) == 0  # nothing was done now
    assert "next" not in capfd.readouterr().out


def test_a_failed_stage_is_not_done(workplace: Path, fault, capfd: pytest.CaptureFixture[str]) -> None:
    fault("say 71")
    assert main(["sft", "--config", "sft.yaml"]) == 71
    assert "done" not in capfd.readouterr().out


def test_in_a_pipeline_the_next_stage_is_no_business_of_the_user(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text("output: out\nstages:\n  sft: {config: sft.yaml}\n")
    assert main(["run", "pipeline.yaml"]) == 0
    said = capfd.readouterr().out
    assert "sft: done: out/sft/model\n" in said
    assert "next:" not in said


@pytest.mark.parametrize(
    ("config", "said"),
    [("sft", "--config rm"), ("smollm2/sft", "--config smollm2/rm"), ("text/sft", "--config rm")],
)
def test_the_next_config_is_of_the_same_family(config: str, said: str) -> None:
    assert (paths.CONFIGS / f"{config}.yaml").is_file()
    invocation = parse("sft", ["--config", config, "--model", "m", "--data", "x.jsonl", "--output", "my run"])
    assert next_command(invocation) == f"rlhf rm {said} --model 'my run' --data PAIRS"
