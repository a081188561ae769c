"""A run over two machines, which here are two directories' worth of `rlhf` commands on one host, joined over loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import flags, run_on_two, start_on, wait
from test_resume import left

from rlhf.training import opening


@pytest.mark.slow  # two `rlhf` commands import torch four times
def test_two_machines_leave_what_two_processes_leave(world, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = flags("sft", world, tmp_path / "machines")
    command = [sys.executable, "-m", "rlhf", "sft", *arguments, "--launch", "cpu", "--nproc", "2", "--num-machines", "2"]
    command += ["--main-address", f"127.0.0.1:{port}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    machines = [
        subprocess.Popen([*command, "--machine-rank", rank], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        for rank in ("1", "0")  # whichever comes first waits for the other
    ]
    said = [machine.communicate(timeout=300)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "joins" in said[0]
    log = tmp_path / "log"
    assert run_on_two("sft", flags("sft", world, tmp_path / "one"), log) == [0, 0], log.read_text()
    assert left(tmp_path / "machines") == left(tmp_path / "one")


def test_a_directory_that_one_machine_does_not_see(world, tmp_path, monkeypatch):
    """Each rank writes to a disk of its own: the second does not find what the first wrote, and both say so."""
    monkeypatch.setattr(opening, "VISIBLE_WITHIN_SECONDS", 0)
    exists = Path.exists

    def unseen(path: Path, **rest: bool) -> bool:
        return exists(path, **rest) and not (path.name == opening.MANIFEST and os.environ.get("RANK") == "1")

    monkeypatch.setattr(Path, "exists", unseen)
    log = tmp_path / "log"
    codes = [wait(pid) for pid in start_on(2, "sft", flags("sft", world, tmp_path / "run"), log)]
    assert codes == [73, 73], log.read_text()
    assert (
        "rank 1 does not see there what rank 0 wrote; --output must be on a file system that all machines share"
        in log.read_text()
    )
