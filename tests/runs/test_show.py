"""`rlhf show`: the chain a person sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.cli import main


@pytest.fixture(autouse=True)
def runs(make_run: Callable[..., None]) -> None:
    for stage in ("sft", "rm", "ppo"):
        make_run(stage)


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


def test_the_chain_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(capsys, "ppo").splitlines()
    assert lines[0].startswith("ppo  ppo, done in ")
    assert [line.split(": ")[0] for line in lines[1:10]] == [
        "├── actor",
        "│   ├── model",
        "│   └── data.train",
        "├── reward",
        "│   ├── model",
        "│   │   ├── model",
        "│   │   └── data.train",
        "│   └── data.train",
        "└── data.train",
    ]
    assert all(line.endswith("  ok") for line in lines[1:10])
    assert "  after kl: 3.25" in lines[10:]


def test_what_changed_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rm/model/weights").write_text("other")
    Path("pairs.jsonl").unlink()
    drawn = show(capsys, "ppo")
    assert "├── reward: rm  rm  changed" in drawn
    assert "data.train: pairs.jsonl  missing" in drawn
    assert "changed since it finished: model/weights" in show(capsys, "rm")


def test_json_and_a_directory_of_runs(capsys: pytest.CaptureFixture[str]) -> None:
    described = json.loads(show(capsys, ".", "--json"))
    assert described["run"] == "ppo"
    assert described["inputs"][1]["inputs"][0]["inputs"][0]["path"] == "base"


def test_an_unfinished_run_says_why(make_run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    make_run("sft", finished=False)
    assert show(capsys, "sft").startswith("sft  sft, running")


def test_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "base"]) == 65
    assert "base: no run" in capsys.readouterr().err
