"""Opening a run: its directory, its lock, the process group; and whatever happens inside ends up in status.json."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from rlhf.config.schema import Stage
from rlhf.errors import ConfigError, OutOfMemory, OutputError, Preempted, RlhfError
from rlhf.report.console import Console
from rlhf.runs.lineage import differences, fingerprint, inputs_of, state_of
from rlhf.runs.lock import run_lock
from rlhf.runs.manifest import MANIFEST, new_manifest, read_json, read_status, versions, write_json, write_status
from rlhf.training.session import Training
from rlhf.training.signals import StopRequest

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer for another gives up. Rollouts and scoring stand outside every collective."""

VISIBLE_WITHIN_SECONDS = 30
"""What one machine writes, another sees on NFS after its cache of attributes has aged: 3 to 30 s (nfs(5), acregmin)."""

_PROCESS_GROUPS: list[object] = []
"""Process groups of this process, held to its end. Freed as the last thing a DDP reducer holds, a gloo group joins its thread
under the GIL that this thread may be waiting for, and neither ever ends (seen with torch 2.13)."""


@contextmanager
def open_training(stage: str, config: Stage, allow_inexact_resume: bool = False) -> Iterator[Training]:
    """Opens the run directory and the process group; whatever happens inside ends up in status.json.

    Raises:
        SystemExit: the run is finished already (code 0), or rank 0 could not open it (its error's code).
        OutOfMemory: in place of torch's error.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = _accelerator(config)
    with ExitStack() as stack:
        console = Console(stage, speak=accelerator.is_main_process)
        stack.callback(console.close)
        stop = StopRequest(config.max_hours)
        stack.callback(stop.restore)
        train = Training(stage, config, accelerator, console, stop, allow_inexact_resume)
        _open_run(train, stack)
        try:
            _require_one_directory(train)
            if config.report.trackers:
                accelerator.init_trackers(stage)
            yield train
        except torch.OutOfMemoryError as error:
            advice = "lower micro_batch_size, or set gradient_checkpointing: true"
            _record(train, OutOfMemory(f"out of memory: {error}; {advice}"))
            raise OutOfMemory(f"out of memory: {error}\n{advice}") from error
        except BaseException as error:
            _record(train, error)
            raise


def _open_run(train: Training, stack: ExitStack) -> None:
    """Rank 0 locks the directory and writes run.json; the others go on, or end, as it does."""
    ending: BaseException | None = None
    if train.is_main:
        try:
            stack.enter_context(run_lock(train.run))
            _write_manifest(train)
        except (RlhfError, SystemExit) as error:
            ending = error
    codes = train.gather(None if ending is None else getattr(ending, "exit_code", 0))
    if ending is not None:
        raise ending
    if codes[0] is not None:
        raise SystemExit(codes[0])


def _require_one_directory(train: Training) -> None:
    """Raises OutputError on every rank where one does not see what rank 0 wrote: checkpoints are read by all."""
    written, deadline = train.run / MANIFEST, time.monotonic() + VISIBLE_WITHIN_SECONDS
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(train.gather(written.exists())) if not sees]
    if blind:
        raise OutputError(
            f"{train.run.absolute()}: rank {blind[0]} does not see there what rank 0 wrote; --output must be on a file system "
            "that all machines share"
        )


def _write_manifest(train: Training) -> None:
    stage, config, threads = train.stage, train.config, torch.get_num_threads()
    state = state_of(train.run, stage, config, train.world_size, threads, train.allow_inexact_resume)
    if state == "done":
        train.note(f"{train.run} is finished already")
        raise SystemExit(0)
    resolved, inputs = config.model_dump(mode="json"), inputs_of(stage, config)
    manifest = new_manifest(stage, resolved, sys.argv, config.seed, train.world_size, threads, inputs, versions())
    if state == "resume":
        before = read_json(train.run / MANIFEST)
        manifest["started"] = before["started"]
        changes = differences(fingerprint(before), fingerprint(manifest))
        manifest["inexact_resumes"] = before.get("inexact_resumes", []) + ([changes] if changes else [])
    train.manifest = manifest
    write_json(train.run / MANIFEST, manifest)
    write_status(train.run, "running")


def _record(train: Training, error: BaseException) -> None:
    """Writes why the run ended. The rank that fails first has the cause; what follows on other ranks is its echo."""
    status = read_status(train.run)
    if status is None or status["state"] == "running":
        state = "preempted" if isinstance(error, Preempted) else "failed"
        reason = str(error).split("\n")[0] or type(error).__name__
        write_status(train.run, state, reason, exit_code=getattr(error, "exit_code", 70))


def _accelerator(config: Stage) -> Accelerator:
    precision = "bf16" if config.precision == "bf16" else "no"
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise ConfigError(
            f"the launch file asks for mixed precision {asked}, the config for {config.precision}; set it in the config only"
        )
    # accelerate spells the option below as torch no longer likes it; a user can do nothing about it
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=list(config.report.trackers) or None,
        project_dir=config.output,
        kwargs_handlers=[
            # Rotary tables are buffers and never change; broadcasting them would make every forward a collective.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
        ],
    )
    if torch.distributed.is_initialized():
        _PROCESS_GROUPS.append(torch.distributed.group.WORLD)
    expected = int(os.environ.get("RLHF_EXPECTED_WORLD_SIZE") or accelerator.num_processes)
    if accelerator.num_processes != expected:
        raise ConfigError(f"{expected} processes were asked for, the launcher started {accelerator.num_processes}")
    return accelerator
