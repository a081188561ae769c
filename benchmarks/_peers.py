"""The peers: where their environments are, and a script of peers/ as a side that takes turns."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _sides import HERE, Side


def add_peer_option(parser: argparse.ArgumentParser, release: str) -> None:
    """--peer. `release` names the environment `make bench` makes from peers/RELEASE.txt."""
    environment = HERE.parent / f".venv-{release}"
    parser.add_argument(
        "--peer", type=Path, default=environment / "bin" / "python", help=f"Python of the peer (default: {environment.name})"
    )


def require(python: Path, release: str) -> dict[str, str]:
    """The peer's versions. Ends the benchmark where its environment is missing or holds another release."""
    package, wanted = release.split("-")
    way_out = f"`make .venv-{release}/.installed` makes it, or --peer PYTHON names another (benchmarks/peers/{release}.txt)"
    if not python.exists():
        sys.exit(f"--peer: {python} is not there; {way_out}")
    ask = "from importlib.metadata import version as v; import json; print(json.dumps({n: v(n) for n in %r}))"
    said = subprocess.run([python, "-c", ask % ([package, "torch", "transformers"],)], capture_output=True, text=True)
    if said.returncode:
        sys.exit(f"--peer: {python} lacks what is compared with; {way_out}\n{said.stderr}")
    versions = json.loads(said.stdout)
    if not f"{versions[package]}.".startswith(f"{wanted}."):
        sys.exit(f"--peer: {python} has {package} {versions[package]}, wanted is {wanted}; {way_out}")
    return versions


def peer(name: str, python: Path, script: str, job: Mapping[str, Any], place: Path, steps: int = 1) -> Side:
    """A script of peers/ with its job, in a file."""
    file = place / f"{name}.job.json"
    file.write_text(json.dumps(job, default=str))
    return Side(name, [python, HERE / "peers" / script, file], steps)
