"""What is not there is told before anything starts, and in a dry run, with the place that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf import digest
from rlhf.cli import main

pytestmark = pytest.mark.usefixtures("workplace")


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft", "--model", "gone/x/y"], "error: gone/x/y: no such model. Looked for"),
        (["sft", "--model", "runs/sft"], "error: runs/sft: no such model"),
        (["sft", "--data", "gone.jsonl"], "error: data.train: no file gone.jsonl\n"),
        (["sft", "--data.eval", "base"], "error: data.eval: no file base (it is a directory)\n"),
        (["rm"], "error: model.path of rm.yaml: sft: no such model. Looked for"),
        (["rm"], "owner/name@revision; run that stage first, or give --model\n"),
        (["ppo", "--actor", "base"], "error: reward.source of ppo.yaml: rm: no such model"),
        (["ppo", "--actor", "base", "--reward", "gone.py:f"], "error: reward.source: no file gone.py\n"),
        (
            ["ppo", "--actor", "base", "--reward", "count:a", "--eval.scorers", "gone.py:f"],
            "eval.scorers[0]: no file gone.py\n",
        ),
    ],
)
def test_what_is_not_there(words: list[str], message: str, dry: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    stage, *flags = words
    assert main([stage, "--config", f"{stage}.yaml", *flags, *dry]) == 65
    said = capfd.readouterr()
    assert message in said.err
    assert said.out == ""
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_file_that_the_config_names(capfd: pytest.CaptureFixture[str]) -> None:
    Path("sft.jsonl").unlink()
    assert main(["sft", "--config", "sft.yaml", "--dry-run"]) == 65
    assert capfd.readouterr().err == "rlhf: error: data.train of sft.yaml: no file sft.jsonl; give --data\n"


def test_an_unfinished_parent(make_run, capfd: pytest.CaptureFixture[str]) -> None:
    make_run("sft", finished=False)
    capfd.readouterr()
    assert main(["rm", "--config", "rm.yaml", "--dry-run"]) == 65
    assert "model.path of rm.yaml: sft: this sft run is not finished; finish it first" in capfd.readouterr().err


def test_a_dry_run_reads_no_weights_and_asks_no_hub(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what is there passes."""
    make_run("sft")
    monkeypatch.setattr(digest, "_hash", None)
    assert main(["rm", "--config", "rm.yaml", "--dry-run"]) == 0
    assert main(["rm", "--config", "rm.yaml", "--dry-run", "--model", "nobody/has-this"]) == 0


def test_a_pipeline_makes_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """What its stages will have written is not asked for, all else is."""
    text = "output: out\nstages:\n  sft: {config: sft.yaml}\n  rm: {config: rm.yaml, model: sft}\n"
    Path("pipeline.yaml").write_text(text)
    assert main(["run", "pipeline.yaml", "--dry-run"]) == 0
    Path("pipeline.yaml").write_text(text + "  ppo: {config: ppo.yaml, actor: sft}\n")
    capfd.readouterr()
    assert main(["run", "pipeline.yaml", "--dry-run"]) == 65
    assert "reward.source of ppo.yaml: rm: no such model" in capfd.readouterr().err.replace(f"{Path.cwd()}/", "")


@pytest.mark.parametrize(
    ("stage", "field", "text", "message"),
    [
        ("sft", "data.train", "", ": the file is empty; expected at least one row\n"),
        ("sft", "data.eval", "\n", ": the file is empty; expected at least one row\n"),
        ("rm", "data.train", '{"prompt": "a", "completion": "b"}\n', ":1: "),
        ("sft", "data.train", '{"question": "a", "completion": "b"}\n', ":1: unknown column 'question', and prompt is missing"),
        ("ppo", "data.train", '{"question": "a"}\n', "is it one of them? --data.columns.prompt question\n"),
        ("ppo", "data.eval", "[1]\n", ":1: expected an object, found a list"),
        ("sft", "data.train", '{"prompt": "a", "completion": "b"', ":1: truncated last line"),
    ],
)
def test_rows_are_looked_at_before_a_model_is_opened(
    stage: str, field: str, text: str, message: str, make_run, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the reader's own words, and before anything is started or written."""
    for parent in ("sft", "rm"):
        make_run(parent)
    Path("bad.jsonl").write_text(text)
    capfd.readouterr()
    assert main([stage, "--config", f"{stage}.yaml", "--output", "new", f"--{field}", "bad.jsonl"]) == 65
    said = capfd.readouterr()
    assert said.err.startswith("rlhf: error: bad.jsonl")
    assert message in said.err
    assert said.out == ""
    assert not Path("new").exists()


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_rows_that_begin_well_are_left_to_the_stage(stage: str, make_run) -> None:
    """The negative control: the stand-ins read none. And what is skipped by `on_error: skip` is no reason to refuse."""
    for parent in ("sft", "rm"):
        make_run(parent)
    good = Path({"sft": "sft.jsonl", "rm": "pairs.jsonl", "ppo": "prompts.jsonl"}[stage]).read_text()
    Path("late.jsonl").write_text(good + "{}\n")
    Path("early.jsonl").write_text("{}\n" + good * 9)
    skip = ("--data.on_error", "skip", "--data.max_skip_fraction")
    for number, (words, code) in enumerate(
        [(["late.jsonl"], 0), (["early.jsonl"], 65), (["early.jsonl", *skip, "0.1"], 0), (["early.jsonl", *skip, "0.01"], 65)]
    ):
        assert main([stage, "--config", f"{stage}.yaml", "--output", f"new{number}", "--data", *words]) == code


def test_columns_that_a_reward_asks_for_are_no_mistake_yet(make_run) -> None:
    for parent in ("sft", "rm"):
        make_run(parent)
    Path("answers.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert main(["ppo", "--config", "ppo.yaml", "--reward", "verify:exact", "--data", "answers.jsonl"]) == 0
