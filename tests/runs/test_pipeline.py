"""`rlhf run`: what runs, what is kept, what is refused, and what is said at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.runs import summary
from rlhf.runs.manifest import read_json

ROWS = {
    "sft": {"completion": "b"},
    "pairs": {"chosen": "b", "rejected": "c"},
    "prompts": {},
}
PIPELINE = """\
output: out
world: {seed: 7}
stages:
  sft: {config: sft.yaml, model: world/base, data.train: world/sft.jsonl}
  rm: {config: rm.yaml, model: sft, data: world/pairs.jsonl}
  ppo: {config: ppo.yaml, actor: sft, reward: rm, data: world/prompts.jsonl, seed: 5, schedule.length: 9}
"""


@pytest.fixture(autouse=True)
def pipeline(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline file; the world it generates is a row a stage instead of thousands."""

    def small_world(directory: Path, seed: int) -> None:
        (directory / "base").mkdir(parents=True, exist_ok=True)
        (directory / "base" / "config.json").write_text("{}")
        for name, row in ROWS.items():
            (directory / f"{name}.jsonl").write_text(json.dumps(row | {"prompt": f"drawn with {seed}"}) + "\n")

    monkeypatch.setattr("rlhf.data.chat_world.write_world", small_world)
    (workplace / "pipeline.yaml").write_text(PIPELINE)
    return workplace / "pipeline.yaml"


def recorded(stage: str) -> dict:
    return read_json(Path("out") / stage / "run.json")


def test_it_runs_and_then_keeps_everything(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pipeline.yaml"]) == 0
    first = capfd.readouterr().out
    assert [first.count(f"{stage} trained") for stage in ("sft", "rm", "ppo")] == [1, 1, 1]
    assert recorded("ppo")["inputs"]["reward"]["path"] == "../rm"
    assert recorded("sft")["inputs"]["data.train"]["parent"] is not None
    assert recorded("ppo")["config"]["schedule"]["length"] == 9
    assert (recorded("sft")["seed"], recorded("ppo")["seed"], recorded("world")["seed"]) == (0, 5, 7)
    before = {stage: recorded(stage) for stage in ("world", "sft", "rm", "ppo")}
    assert main(["run", "pipeline.yaml"]) == 0
    second = capfd.readouterr().out
    for stage in before:
        assert f"{stage}: done, kept" in second
        assert recorded(stage) == before[stage]


def test_it_stops_at_the_first_failure_and_goes_on_there(
    fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    fault("say 71")
    assert main(["run", "pipeline.yaml"]) == 71
    assert not Path("out/rm").exists()
    fault("")
    capfd.readouterr()
    assert main(["run", "pipeline.yaml"]) == 0
    said = capfd.readouterr().out
    assert "world: done, kept" in said
    assert "sft: going on with" in said


def test_flags_of_the_command_win_over_the_file() -> None:
    flags = ["--output", "other", "--seed", "3", "--ppo.schedule.length", "2", "--ppo.actor=world/base", "--rm.seed=4"]
    assert main(["run", "pipeline.yaml", *flags]) == 0
    world, sft, rm, ppo = (read_json(Path("other") / name / "run.json") for name in ("world", "sft", "rm", "ppo"))
    assert [manifest["seed"] for manifest in (world, sft, rm, ppo)] == [3, 3, 4, 3]
    assert ppo["config"]["schedule"]["length"] == 2


def test_what_is_stale_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pipeline.yaml"]) == 0
    capfd.readouterr()
    assert main(["run", "pipeline.yaml", "--rm.optimizer.lr", "0.5"]) == 65
    assert "optimizer.lr: 1e-05 -> 0.5" in capfd.readouterr().err
    assert main(["run", "pipeline.yaml", "--seed", "1"]) == 65
    assert "is the world of seed 7, not 1" in capfd.readouterr().err
    pairs = Path("out/world/pairs.jsonl")
    pairs.write_text("edited\n")
    assert main(["run", "pipeline.yaml"]) == 65
    assert "changed since it was generated: pairs.jsonl" in capfd.readouterr().err


@pytest.mark.parametrize("file", ["weights", "config.json"])
def test_one_changed_byte_of_a_parent_is_refused(file: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pipeline.yaml"]) == 0
    weights = Path("out/sft/model") / file
    weights.write_bytes(b"!" + weights.read_bytes()[1:])
    assert main(["run", "pipeline.yaml"]) == 65
    error = capfd.readouterr().err
    assert f"model/{file}" in error
    assert "Traceback" not in error


def test_json_on_standard_output_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pipeline.yaml", "--json"]) == 0
    captured = capfd.readouterr()
    figures = json.loads(captured.out)
    assert figures["before"] == {"helpful": 0.2, "gold": -0.5}
    assert figures["after"]["gold"] == 1.5
    assert figures["kl"] == 3.25
    assert figures["reward_model"] == {"accuracy": 0.9, "low": 0.85, "high": 0.95}
    assert list(figures["seconds"]) == ["world", "sft", "rm", "ppo"]
    assert figures["samples"][0] == {"prompt": "one", "before": "one at [step] 0", "after": "one at [step] 2"}
    assert "ppo trained" in captured.err


def test_the_table_for_people(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "pipeline.yaml"]) == 0
    said = capfd.readouterr().out
    for words in ("SFT  two at [step] 0", "PPO  two at [step] 2", "20%", "80%", "-0.50", "1.50", "3.25"):
        assert words in said
    assert "0.900 [0.850, 0.950]" in said


def test_a_summary_of_a_part() -> None:
    Path("pipeline.yaml").write_text("output: out\nstages:\n  sft: {config: sft.yaml}\n")
    assert main(["run", "pipeline.yaml"]) == 0
    figures = summary.summary(Path("out"))
    assert figures.keys() == {"output", "seconds", "samples"}


def test_a_dry_run_touches_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    assert main(["run", "pipeline.yaml", "--dry-run", "--json"]) == 0
    assert sorted(Path.cwd().rglob("*")) == before
    plans = json.loads(capfd.readouterr().out)
    assert [plan["stage"] for plan in plans] == ["sft", "rm", "ppo"]
    assert plans[2]["config"]["roles"]["actor"] == "out/sft"
    assert "out/ppo/critic/" in plans[2]["writes"]
    assert ["alarms.jsonl" in " ".join(plan["writes"]) for plan in plans] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {sft: {config: sft.yaml}}", "output: missing"),
        ("output: out\nstages:\n  stf: {config: sft.yaml}", r"pipeline.yaml:3:3: stages.stf: .*`stages.sft`"),
        ("output: out\nstages:\n  sft: {model: base}", r"pipeline.yaml:2:1: stages: sft has no `config`"),
        ("output: out\nstages:\n  sft: {config: sft.yaml, output: x}", r"sft.output is not a choice"),
        (
            "output: out\nstages:\n  sft: {config: sft.yaml, modle: base}",
            r"pipeline.yaml, stage sft:\n--modle: unknown flag; did you mean `--model`",
        ),
        ("output: out\nstages:\n  sft: {config: nowhere.yaml}", r"nowhere.yaml: no such config"),
    ],
)
def test_mistakes_in_the_file(text: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text(text)
    assert main(["run", "pipeline.yaml"]) == 78
    error = capfd.readouterr().err
    assert re.search(message, error), error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pipeline.yaml", "--sft.output", "x"], 78, "set that with --output"),
        (["pipeline.yaml", "--ppo.schedule.length"], 2, "give a value"),
        (["pipeline.yaml", "--schedule.length", "3"], 2, "--schedule.length: unknown here"),
        (["pipeline.yaml", "--seed", "x"], 2, "invalid int value"),
        (["nothing"], 78, "nothing: no such pipeline; there is quickstart"),
        ([], 2, "required: pipeline"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == code
    assert message in capfd.readouterr().err


def test_a_stage_the_pipeline_does_not_have(capfd: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text("output: out\nstages:\n  sft: {config: sft.yaml}\n")
    assert main(["run", "pipeline.yaml", "--ppo.seed", "1"]) == 78
    assert "has no stage ppo; it has sft" in capfd.readouterr().err


def test_a_word_that_is_also_a_stage_is_no_path(pipeline: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grpo = "  grpo: {config: own.yaml, actor: sft, reward: rm, data: world/prompts.jsonl, grpo.estimator: grpo}\n"
    pipeline.write_text(PIPELINE[: PIPELINE.index("  ppo:")] + grpo)
    pipeline.with_name("own.yaml").write_text("grpo: {minibatch_size: 64}\n")
    assert main(["run", "pipeline.yaml", "--dry-run"]) == 0
    text = capfd.readouterr().out
    assert '"estimator": "grpo"' in text
    assert '"actor": "out/sft"' in text
