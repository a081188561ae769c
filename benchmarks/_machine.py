"""Where a figure was measured: machine, versions, date and commit, in each JSON line."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, str | int]:
    cpu = next((line.partition(": ")[2] for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), "")
    memory = next((int(line.split()[1]) >> 20 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemTotal")), 0)
    versions = {name: version(name) for name in ("torch", "transformers")}
    found = {"cpu": cpu or platform.processor(), "cores": os.cpu_count() or 1, "memory_gib": memory, "commit": commit()}
    return found | {"python": platform.python_version(), "date": date.today().isoformat()} | versions


def commit() -> str:
    """`-changed` where the tree is not what was committed."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=-changed"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return said.stdout.strip() or "unknown"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
