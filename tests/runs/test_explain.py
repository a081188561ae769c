"""Whatever a run can write, check or end with has an explanation: read from runs and from the source, not from the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf import errors
from rlhf.cli import main
from rlhf.runs.explain import advice, explanation, explanations

ROOT = Path(__file__).resolve().parents[2]
SOURCES = "".join(file.read_text() for folder in ("rlhf/training", "rlhf/rollout") for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    "code", sorted({kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")} | {0, 70, 130, 143})
)
def test_every_exit_code_is_explained(code):
    assert explanation(str(code))["kind"] == "exit codes"


@pytest.mark.parametrize("check", sorted(set(re.findall(r'checks\.expect\(\s*"([^"]+)"', SOURCES))))
def test_every_self_check_is_explained(check):
    assert explanation(check)["kind"] == "checks"


@pytest.mark.parametrize(
    "metric", sorted(set(re.findall(r'"((?:reward|policy|kl|value|rollout|advantage|optimizer)/[a-z_]+)"', SOURCES)))
)
def test_every_metric_that_is_named_is_explained(metric):
    assert explanation(metric)["kind"] == "metrics"


def test_entries_are_whole():
    for entries in explanations().values():
        for name, entry in entries.items():
            assert entry.keys() <= {"what", "healthy", "causes", "do"}, name
            assert entry["what"].endswith("."), name
            assert len(entry.get("causes", ())) <= 3, name
            assert "do" in entry or "causes" not in entry, name


def test_what_a_user_sees(capsys):
    assert main(["explain", "kl/sequence"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("kl/sequence: KL of the policy from the reference")
    assert "1. the learning rate is too high" in shown
    assert main(["explain", "first", "ratio", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "checks"
    assert main(["explain"]) == 0
    assert "kl/sequence" in capsys.readouterr().out


def test_a_near_miss_is_told(capsys):
    assert main(["explain", "kl/sequenze"]) == 2
    assert "did you mean kl/sequence" in capsys.readouterr().err


def test_a_failed_check_brings_its_causes():
    assert advice("first ratio")[0].startswith("likely: dropout is on; or ")
    assert advice("something new") == []
