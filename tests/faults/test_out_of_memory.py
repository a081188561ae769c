"""Out of memory ends with code 71 and an advice, whoever says so; what is sure not to fit is refused before training."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from harness import flags, fork, metrics, run, start_on, wait
from torch import nn

from rlhf import cli
from rlhf.errors import DataError, OutOfMemory
from rlhf.models.load import Loading, load_actor
from rlhf.training import memory

MORE = {"checkpoint__keep": 9, "micro_batch_size": 4, "data__eval": "null"}


def on_the_way(allocate):
    """Breaks the second of the three micro-batches of the third step (on the last rank, which has two)."""

    def break_(module) -> None:
        plain, calls = module.sft_loss, []

        def loss(*arguments):
            calls.append(1)
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            if len(calls) == {1: 8, 2: 5}[ranks] and os.environ.get("RANK", "0") == str(ranks - 1):
                allocate()
            return plain(*arguments)

        module.sft_loss = loss

    return break_


def within(limit: int, allocate):
    """What is allocated while the process may take 100 MB more than it has."""

    def go() -> None:
        used = psutil.Process().memory_info()
        now = used.vms if limit == resource.RLIMIT_AS else used.data
        resource.setrlimit(limit, (now + 100_000_000, resource.RLIM_INFINITY))
        kept = [allocate() for _ in range(50)]
        raise AssertionError(f"{len(kept)} times 40 MB were there")

    return go


def raise_(error: BaseException):
    def go() -> None:
        raise error

    return go


FAULTS = {
    "torch, address space": within(resource.RLIMIT_AS, lambda: torch.zeros(10_000_000)),
    "torch, data": within(resource.RLIMIT_DATA, lambda: torch.zeros(10_000_000)),
    "Python": within(resource.RLIMIT_AS, lambda: bytearray(40_000_000)),
    "CUDA": raise_(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "C++": raise_(RuntimeError("std::bad_alloc")),
}


@pytest.fixture(scope="module")
def clean(world, tmp_path_factory):
    directory = tmp_path_factory.mktemp("clean")
    assert run("sft", flags("sft", world, directory / "sft", **MORE), directory / "log") == 0
    return directory / "sft"


def files(directory: Path) -> dict[str, bytes]:
    assert directory.is_dir()
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_ends_with_an_advice_and_the_last_checkpoint(fault, world, clean, tmp_path):
    output, log = tmp_path / "sft", tmp_path / "log"
    arguments = flags("sft", world, output, **MORE)
    assert run("sft", arguments, log, on_the_way(FAULTS[fault])) == 71, log.read_text()
    assert "error: out of memory: " in log.read_text()
    assert "lower micro_batch_size, or set gradient_checkpointing: true" in log.read_text()
    assert "Traceback" not in log.read_text()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 71)
    assert metrics(output) == metrics(clean)[:2]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert files(output / "checkpoints" / "step-2") == files(clean / "checkpoints" / "step-2")
    assert run("sft", arguments, log) == 0, log.read_text()
    assert metrics(output) == metrics(clean)
    for place in ("checkpoints/step-4", "model"):
        assert files(output / place) == files(clean / place)


def test_the_other_ranks_end_as_well(world, tmp_path):
    log, arguments = tmp_path / "log", flags("sft", world, tmp_path / "sft", **MORE)
    began = time.monotonic()
    pids = start_on(2, "sft", arguments, log, on_the_way(FAULTS["torch, address space"]))
    codes = [wait(pid) for pid in pids]
    assert codes == [74, 71], log.read_text()
    assert time.monotonic() - began < 60
    assert json.loads((tmp_path / "sft" / "status.json").read_text())["exit_code"] == 71
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1, 2]


def test_other_errors_are_what_they_are():
    for error in (RuntimeError("shape mismatch"), DataError("out of memory"), ValueError("out of memory"), OutOfMemory("x")):
        assert OutOfMemory.behind(error, "buy more") is None
    found = OutOfMemory.behind(OSError(12, os.strerror(12)), "buy more")
    assert str(found) == "out of memory: [Errno 12] Cannot allocate memory\nbuy more"
    assert str(OutOfMemory.behind(MemoryError(), "buy more")) == "out of memory: the machine has no more\nbuy more"


@pytest.mark.parametrize(("function", "advice"), [("sft_batch", "lower batch_size"), ("open_policy", "close other")])
def test_a_command_ends_so_too(function, advice, world, tmp_path):
    """2^50 bytes are more than an address space has."""

    def evaluate() -> None:
        from rlhf.training.evaluation import rows

        setattr(rows, function, lambda *_: torch.empty(2**50, dtype=torch.uint8))
        raise SystemExit(cli.main(["eval", str(world / "model"), "--data", str(world / "sft.jsonl")]))

    log = tmp_path / "log"
    assert wait(fork(evaluate, log=log)) == 71, log.read_text()
    assert "can't allocate memory" in log.read_text()
    assert advice in log.read_text()
    assert "Traceback" not in log.read_text()


# ---- before training -------------------------------------------------------------------------------------------------


def faked(room: float):
    def change(module) -> None:
        memory.available = lambda device: room  # type: ignore[assignment]

    return change


@pytest.mark.parametrize("processes", [1, 2])
def test_what_cannot_fit_is_refused(processes, world, tmp_path):
    """A gradient and two moments of float32 for each weight, in each process; with a byte less the run does not begin."""
    model = load_actor(str(world / "model"), Loading())
    needed = 12 * sum({id(p): p.numel() for p in model.parameters()}.values()) * processes
    log, output = tmp_path / "log", tmp_path / "sft"
    arguments = flags("sft", world, output, **MORE, schedule__length=1)
    codes = [wait(pid) for pid in start_on(processes, "sft", arguments, log, faked(needed - 1))]
    assert codes == [71] * processes, log.read_text()
    assert f"training needs at least {needed / 1e9:.2f} GB more" in log.read_text()
    assert "lora.rank, frozen_layers" in log.read_text()
    assert json.loads((output / "status.json").read_text())["exit_code"] == 71
    assert not (output / "metrics.jsonl").exists()
    assert not (output / "checkpoints").exists()
    assert {wait(pid) for pid in start_on(processes, "sft", arguments, log, faked(needed))} == {0}, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "fsdp"])
def test_what_ranks_divide_is_needed_once(engine, world, tmp_path):
    model = load_actor(str(world / "model"), Loading())
    weights = 4 * sum({id(p): p.numel() for p in model.parameters()}.values())
    of_each = {"zero1": 1 + 1, "zero2": 0.5 + 1, "zero3": 0.5 + 1 - 0.5, "fsdp": 0.5 + 1 - 0.5}[engine] * weights
    log, arguments = tmp_path / "log", flags("sft", world, tmp_path / "sft", **MORE, schedule__length=1)
    for room, code in ((2 * of_each - 1, 71), (2 * of_each, 0)):
        assert {wait(pid) for pid in start_on(2, "sft", arguments, log, faked(room), engine)} == {code}, log.read_text()


def test_what_is_still_needed_by_hand():
    """A million weights trained and a million frozen, 4 bytes each, on the host."""
    policy = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False).requires_grad_(False))

    def needed(device: str, divided=frozenset(), offloaded=frozenset()) -> dict[str, float]:
        engine = SimpleNamespace(divided=divided, offloaded=offloaded)
        return memory.still_needed(policy, engine, 2, torch.device(device))  # type: ignore[arg-type]

    assert needed("cpu") == {"weights": 0, "gradients": 4e6, "optimizer": 8e6}
    assert needed("cuda") == {"weights": 8e6, "gradients": 4e6, "optimizer": 8e6}
    everything = frozenset({"weights", "gradients", "optimizer"})
    assert needed("cpu", everything) == {"weights": -4e6, "gradients": 2e6, "optimizer": 4e6}
    assert needed("cuda", everything) == {"weights": 4e6, "gradients": 2e6, "optimizer": 4e6}
    assert needed("cuda", offloaded=frozenset({"optimizer"})) == {"weights": 8e6, "gradients": 4e6}
    assert needed("cpu", offloaded=frozenset({"optimizer"})) == needed("cpu")


def group(place: Path, **texts: object) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (place / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_tightest_control_group_counts(tmp_path):
    """Version 2: 100 of 1000 bytes left in the parent, of whose use 50 are pages of files; the child has no limit."""
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text("0::/jobs/mine\n")
    group(root / "jobs" / "mine", memory__max="max", memory__current=700)
    stat = "anon 850\nactive_file 20\ninactive_file 30"
    group(root / "jobs", memory__max=1000, memory__current=900, memory__stat=stat)
    group(root, memory__stat=stat)
    assert list(memory._room_in_groups(root, own)) == [math.inf, 150]


def test_control_groups_of_version_one(tmp_path):
    """The path is the host's and does not exist in here: the root is the container's group."""
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text("3:cpu,cpuacct:/a\n2:memory:/docker/1234\n0::/\n")
    stat = "inactive_file 1\ntotal_inactive_file 7\ntotal_active_file 3"
    names = {"memory__limit_in_bytes": 500, "memory__usage_in_bytes": 460, "memory__stat": stat}
    group(root / "memory", **names)
    assert list(memory._room_in_groups(root, own)) == [math.inf, 50]
    assert list(memory._room_in_groups(root, tmp_path / "none")) == [math.inf]


def test_what_is_available_here():
    """No more than the machine has, and something."""
    assert 0 < memory.available(torch.device("cpu")) <= psutil.virtual_memory().total + psutil.swap_memory().total
