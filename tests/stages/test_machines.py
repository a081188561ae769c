"""A run over two machines, which here are two directories' worth of `rlhf` commands on one host, joined over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from harness import flags, left, run_on_two, start_on, wait

from rlhf.runs.manifest import read_status
from rlhf.training import opening


@pytest.fixture
def loopback():
    """(what a command on each machine begins with, the address of machine 0)"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ([], []), f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def two_hosts():
    """The same for two network namespaces with a cable between them: neither reaches the other over loopback."""
    names = [f"rlhf{os.getpid()}{end}" for end in "ab"]
    cable = [f"rl{os.getpid() % 100000}{end}" for end in "ab"]
    setup = [f"ip netns add {name}" for name in names]
    setup.append(f"ip link add {cable[0]} netns {names[0]} type veth peer name {cable[1]} netns {names[1]}")
    for number, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
        setup += [f"ip -n {name} addr add 10.77.0.{number}/24 dev {end}", f"ip -n {name} link set {end} up"]
        setup.append(f"ip -n {name} link set lo up")
    try:
        for command in setup:
            try:
                subprocess.run(command.split(), check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {command}: {error}")
        prefixes = [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"] for name, end in zip(names, cable, strict=True)
        ]
        yield prefixes, "10.77.0.1:29500"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow  # two `rlhf` commands import torch four times
@pytest.mark.parametrize("network", ["loopback", "two_hosts"])
def test_two_machines_leave_what_two_processes_leave(world, tmp_path, network, request):
    prefixes, address = request.getfixturevalue(network)
    arguments = flags("sft", world, tmp_path / "machines")
    command = [sys.executable, "-m", "rlhf", "sft", *arguments, "--launch", "cpu", "--nproc", "2", "--num-machines", "2"]
    command += ["--main-address", address]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    machines = [
        subprocess.Popen(
            [*prefixes[rank], *command, "--machine-rank", str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        for rank in (1, 0)  # whichever comes first waits for the other
    ]
    said = [machine.communicate(timeout=300)[0].decode() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "sft: joins" in said[0]
    log = tmp_path / "log"
    assert run_on_two("sft", flags("sft", world, tmp_path / "one"), log) == [0, 0], log.read_text()
    assert left(tmp_path / "machines") == left(tmp_path / "one")


def run_unlike(world, output, log, *of_last: str) -> list[int]:
    """Two processes, the second with flags over those of the first."""
    return [wait(pid) for pid in start_on(2, "sft", flags("sft", world, output), log, of_last=of_last)]


def test_a_directory_that_one_machine_does_not_see(world, tmp_path, monkeypatch):
    """The second has a directory of the same name on a disk of its own, with a run in it, even."""
    monkeypatch.setattr(opening, "VISIBLE_WITHIN_SECONDS", 0)
    log, other = tmp_path / "log", tmp_path / "other"
    for _ in range(2):
        codes = run_unlike(world, tmp_path / "run", log, f"--output={other}")
        assert codes == [73, 73], log.read_text()
        assert "rank 1 does not see there what rank 0 writes; --output must be on a file system that all" in log.read_text()
        assert read_status(tmp_path / "run")["exit_code"] == 73
        other.mkdir(exist_ok=True)
        (other / "run.json").write_text("{}")


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--optimizer.lr=0.5", "optimizer.lr: 0.001 -> 0.5"), ("--seed=7", "seed: 0 -> 7"), ("--threads=2", "threads: 1 -> 2")],
)
def test_processes_that_were_not_started_alike(world, tmp_path, flag, said):
    log = tmp_path / "log"
    assert run_unlike(world, tmp_path / "run", log, flag) == [78, 78], log.read_text()
    assert log.read_text().count("rank 1 was not started as rank 0 was") == 1
    assert said in log.read_text()
    assert not (tmp_path / "run").exists()


def test_other_data_on_the_second_machine(world, tmp_path):
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join((world / "sft.jsonl").read_text().splitlines(keepends=True)[:-1]))
    log = tmp_path / "log"
    assert run_unlike(world, tmp_path / "run", log, f"--data={shorter}") == [78, 78], log.read_text()
    assert "contents of data.train: " in log.read_text()
    assert run_unlike(world, tmp_path / "run", log, "--data=nowhere.jsonl") == [65, 65]
    assert "rank 1: data.train: no file nowhere.jsonl" in log.read_text()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_is_named(world, tmp_path, killed):
    """Within 5 s, whatever the other is at. That the same command then goes on exactly, tests/faults/test_kills.py shows."""
    log, output = tmp_path / "log", tmp_path / "run"
    arguments = flags("sft", world, output, schedule__length=200, checkpoint__every=1)
    pids = start_on(2, "sft", arguments, log)
    while not list(output.glob("checkpoints/step-*")):
        time.sleep(0.01)
    os.kill(pids[killed], signal.SIGKILL)
    since = time.monotonic()
    assert wait(pids[killed]) == -signal.SIGKILL
    assert wait(pids[1 - killed]) == 74, log.read_text()
    assert time.monotonic() - since < 5
    assert f"rank {killed} (pid {pids[killed]} on {socket.gethostname()}) is gone" in log.read_text()
    assert f"rank {killed}" in read_status(output)["reason"]
