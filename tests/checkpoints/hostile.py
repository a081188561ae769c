"""Damaging a checkpoint, and what must come of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main

WITNESS = "it-ran"
Case = tuple[str, Callable[[Path], Any], str]
"""(which of the checkpoints, what is done to it, what the message says)"""


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def refused(case: Case, home: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, with nothing run and nothing left; `directory` is the one the process is in."""
    kind, damage, message = case
    root = Path(shutil.copytree(home / kind, directory / "source"))
    damage(root)
    code = main(["convert", str(root), "out", "--to", "hf" if kind != "hf" else "megatron"])
    said = capsys.readouterr().err.strip()
    assert code == 65, said
    assert len(said.splitlines()) == 1, said
    assert said.startswith("rlhf: error: ")
    assert "weights_only" not in said, "torch's advice is to run it"
    assert re.search(message, said), said
    assert not Path(WITNESS).exists()
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))
