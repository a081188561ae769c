"""The commands of docs/report.md, on a small pipeline of the name that they use."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from rlhf.commands import report, runs

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text()
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_page_runs(line, runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    program, word, *words = line.split()
    assert program == "rlhf"
    assert COMMANDS[word](words) == 0
    assert "ppo" in capsys.readouterr().out


COMMANDS = {"report": report.run, "runs": runs.run}
