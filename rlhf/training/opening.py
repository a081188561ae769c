"""Opening a run: its processes, its directory, its lock; and whatever happens inside ends up in status.json."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.config.parse import Resume
from rlhf.config.schema import Stage
from rlhf.data.templates import TOKENIZER
from rlhf.errors import ConfigError, OutputError, Preempted, RlhfError
from rlhf.report.console import Console
from rlhf.runs.lineage import MACHINE, differences, fingerprint, inputs_of, state_of
from rlhf.runs.lock import check_output, run_lock
from rlhf.runs.manifest import MANIFEST, new_manifest, read_json, say_done, versions, write_json, write_status
from rlhf.training.ending import cause_of, full_disk, record
from rlhf.training.preflight import all_reduce_speed
from rlhf.training.processes import Peer, lost, start_processes
from rlhf.training.session import Training
from rlhf.training.signals import StopRequest

VISIBLE_WITHIN_SECONDS = 30
"""What one machine writes, another sees on NFS after its cache of attributes has aged: 3 to 30 s (nfs(5), acregmin)."""


LEFT_BY_A_KILL = (".*.json-*", ".*.jsonl-*", ".seen-*")
"""Files under names that only their writer knows; the lock is held when they are removed, so none is."""


@contextmanager
def open_training(stage: str, config: Stage, resume: Resume | None = None) -> Iterator[Training]:
    """Opens the processes and the run directory; whatever happens inside ends up in status.json.

    Raises:
        SystemExit: the run is finished already (code 0), or another rank could not open it (its error's code).
        OutOfMemory, LostRank: in place of torch's error.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator, engine = start_processes(config)
    with ExitStack() as stack:
        console = Console(stage, speak=accelerator.is_main_process)
        stack.callback(console.close)
        stop = StopRequest(config.max_hours)
        stack.callback(stop.restore)
        train = Training(stage, config, accelerator, engine, console, stop, resume or Resume())
        train.peers = train.gather(Peer.this(train.rank))
        stop.end_at_once_if = lambda: lost(train.peers)
        _open_run(train, stack)
        stop.before_ending_at_once = partial(_end_at_once, train)
        try:
            _require_one_directory(train)
            if train.world_size > 1:
                train.note(all_reduce_speed(train.device, train.world_size))
            if config.report.trackers:
                accelerator.init_trackers(stage, init_kwargs=_named(train.run))
            yield train
        except BaseException as error:
            stop.ending()  # or a launcher that ends this process, too, would cut short what is said of it
            cause = cause_of(train, error)
            record(train, cause)
            if cause is error:
                raise
            raise cause from error


def _end_at_once(train: Training, number: int) -> None:
    train.console.abandon()
    record(train, Preempted(number))


def _named(run: Path) -> dict[str, dict[str, str]]:
    """What each tracker calls the run, and where it keeps its files."""
    name, place = run.resolve().name, str(run)
    return {"wandb": {"name": name, "dir": place}, "trackio": {"name": name}, "mlflow": {"run_name": name}}


def _open_run(train: Training, stack: ExitStack) -> None:
    """Compares what ranks were given; then rank 0 locks the directory and writes run.json, and the others end as it does."""
    with _ending_together(train):
        if train.is_main:
            check_output(train.run)
        manifest = _manifest(train)
    _require_equal(train, {name: value for name, value in fingerprint(manifest).items() if name != "device"})
    with _ending_together(train):
        if train.is_main:
            stack.enter_context(run_lock(train.run))
            _begin(train, manifest)


@contextmanager
def _ending_together(train: Training) -> Iterator[None]:
    """What ends the run on one rank ends it on all; rank 0 says what another cannot be heard to say."""
    ending: RlhfError | SystemExit | None = None
    try:
        yield
    except (RlhfError, SystemExit) as error:
        ending = error
    except OSError as error:
        ending = full_disk(train.run, error)
        if ending is None:
            raise
    train.wait_for_main()  # inputs may take longer to hash than any exchange of tensors may
    told = None if ending is None else (getattr(ending, "exit_code", 0), str(ending))
    endings = {rank: one for rank, one in enumerate(train.gather(told)) if one is not None}
    if ending is not None:
        raise ending
    if endings:
        rank, (code, text) = next(iter(endings.items()))
        if train.is_main:
            print(f"rlhf: error: rank {rank}: {text}", file=sys.stderr, flush=True)
        raise SystemExit(code)


def _require_equal(train: Training, own: dict[str, Any]) -> None:
    """Raises ConfigError where a rank has another config, other inputs, versions or threads than rank 0."""
    first, *others = train.gather(own)
    for rank, found in enumerate(others, start=1):
        if changes := differences(first, found):
            lines = "".join(f"\n  {change}" for change in changes)
            error = ConfigError(f"rank {rank} was not started as rank 0 was (rank 0 -> rank {rank}):{lines}")
            raise error if train.is_main else SystemExit(error.exit_code)


def _require_one_directory(train: Training) -> None:
    """Raises OutputError on every rank where one does not see what rank 0 writes: checkpoints are read by all."""
    word = train.gather(secrets.token_hex(8))[0]
    seen = train.run / f".seen-{word}"
    if train.is_main:
        seen.touch()
    train.gather(None)
    deadline = time.monotonic() + VISIBLE_WITHIN_SECONDS
    while not os.path.exists(seen) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(train.gather(os.path.exists(seen))) if not sees]
    if train.is_main:
        seen.unlink()
    if blind:
        raise OutputError(
            f"{train.run.absolute()}: rank {blind[0]} does not see there what rank 0 writes; --output must be on a file system "
            "that all machines share"
        )


def _manifest(train: Training) -> dict[str, Any]:
    """What this rank was given and reads. Nothing is written yet."""
    config = train.config
    inputs, resolved = inputs_of(train.stage, config), config.model_dump(mode="json")
    threads, seed = torch.get_num_threads(), config.seed
    machine = train.world_size, threads, inputs, versions(), train.engine.name, _device(train.device)
    return new_manifest(train.stage, resolved, sys.argv, seed, *machine)


def _device(device: torch.device) -> str:
    """What rounds: kernels differ between GPUs, and between the instruction sets of CPUs."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _begin(train: Training, manifest: dict[str, Any]) -> None:
    for pattern in LEFT_BY_A_KILL:
        for file in train.run.glob(pattern):
            file.unlink(missing_ok=True)
    machine = {name: manifest[name] for name in MACHINE}
    state = state_of(train.run, train.stage, train.config, machine, train.resume.allow_inexact)
    if state == "done":
        say_done(train.run)
        train.console.note(f"{train.run} is finished already")
        raise SystemExit(0)
    if state == "resume":
        before = read_json(train.run / MANIFEST)
        manifest |= {name: before[name] for name in ("started", *TOKENIZER) if name in before}
        changes = differences(fingerprint(before), fingerprint(manifest))
        manifest["inexact_resumes"] = before.get("inexact_resumes", []) + ([changes] if changes else [])
        train.notes.mend()
    train.manifest = manifest
    write_json(train.run / MANIFEST, manifest)
    write_status(train.run, "running")
