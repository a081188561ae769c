"""How a run ended: what errors of torch and of the system mean, and what status.json says of it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from rlhf.errors import LostRank, OutOfMemory, Paused, Preempted, RlhfError, StorageError, disk_failed
from rlhf.runs.lock import existing
from rlhf.runs.manifest import read_status, write_status
from rlhf.training.processes import COLLECTIVE_TIMEOUT, GONE_WITHIN_SECONDS, lost, stopped
from rlhf.training.session import Training

SMALLER = "lower micro_batch_size, or set gradient_checkpointing: true"

CLOSED = ("connection reset", "connection closed", "connection refused", "broken pipe", "read error")
"""In what gloo says of a process that was there."""


def cause_of(train: Training, error: BaseException) -> BaseException:
    """The error that says to a person what this one means; itself, where it says that already."""
    return OutOfMemory.behind(error, SMALLER) or _lost_rank(train, error) or full_disk(train.run, error) or error


def _lost_rank(train: Training, error: BaseException) -> LostRank | None:
    """What torch says when a process that this one waits for is gone tells nobody which."""
    if train.world_size == 1 or not isinstance(error, RuntimeError):
        return None
    if gone := lost(train.peers, GONE_WITHIN_SECONDS):
        return LostRank(gone)
    said = str(error).lower()
    if isinstance(error, torch.distributed.DistError) or any(sign in said for sign in CLOSED):
        return LostRank(f"a process on another machine is gone ({str(error).splitlines()[0]})")
    if "timed out" in said:
        minutes = COLLECTIVE_TIMEOUT.total_seconds() / 60
        which = stopped(train.peers) or "it hangs, or its machine is gone"
        return LostRank(f"no answer from another process for {minutes:.2g} minutes: {which}")
    return None


def full_disk(run: Path, error: BaseException) -> StorageError | None:
    """That the disk is full or fails, where that is what the error means."""
    if isinstance(error, RlhfError) or not disk_failed(error):
        return None
    free = shutil.disk_usage(existing(run)).free
    return StorageError(
        f"{run}: cannot be written ({error}; {free:,} bytes are free); what was saved is untouched: make room, and run "
        "the same command again"
    )


def record(train: Training, error: BaseException) -> None:
    """Writes why the run ended. The rank that fails first has the cause; what follows on other ranks is its echo."""
    if not os.path.isdir(train.run):
        return  # a rank that does not see it, and another one that says so
    status = read_status(train.run)
    if status is None or status["state"] == "running":
        state = "preempted" if isinstance(error, Preempted | Paused) else "failed"
        reason = str(error).split("\n")[0] or type(error).__name__
        try:
            write_status(train.run, state, reason, exit_code=getattr(error, "exit_code", 70))
        except OSError as failure:  # what ended the run may keep this from being written, too, and is what must be said
            print(f"{train.run}: status.json cannot say so: {failure}", file=sys.stderr, flush=True)
