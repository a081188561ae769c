"""Packages that tests compare with and the project does not need: in a folder of their own, used by a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def install(folder: Path, *packages: str) -> Path:
    """Their wheels without what these depend on; skips the test where there is no package index."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{packages[0]} cannot be installed here: {done.stderr.splitlines()[-1:]}")
    return folder


def run(driver: Path, folder: Path, *arguments: str, flags: tuple[str, ...] = (), **environment: str) -> Any:
    """What the program says in its last line, as JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), str(ROOT)])
    command = [sys.executable, *flags, str(driver), *arguments]
    done = subprocess.run(command, env=inherited | environment | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
