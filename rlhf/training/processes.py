"""The processes of a run: what the launcher started, which engine it asks for, and whether all are still there."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

from rlhf.config.engines import Engine as Named
from rlhf.config.engines import require_fit, require_trackers
from rlhf.config.schema import Stage
from rlhf.errors import ConfigError
from rlhf.paths import shipped_or_own
from rlhf.training.engines import Engine
from rlhf.training.engines.data_parallel import DataParallel

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer for another gives up: a rollout, too, must end on all ranks within so long of each other."""

FILES_TIMEOUT = timedelta(days=1)
"""For rank 0 to read, hash or write a checkpoint or a result."""

GONE_WITHIN_SECONDS = 2.0
"""A collective may fail a moment before the process that it waited for can be seen to be gone."""

DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
DEEPSPEED, FSDP, ON_CPU = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU"
"""What `accelerate launch` tells a script by."""

_PROCESS_GROUPS: list[object] = []
"""Process groups of this process, held to its end. Freed as the last thing a DDP reducer holds, a gloo group joins its thread
under the GIL that this thread may be waiting for, and neither ever ends (seen with torch 2.13)."""


def start_processes(config: Stage) -> tuple[Accelerator, Engine]:
    """Joins the other processes. Accelerate is told of plain ones only; the engine that the launch file names is opened here,
    on a CPU as on GPUs.

    Raises:
        ConfigError: the launch file sets a precision, names an engine that is not installed or cannot do with this config, or
            the launcher started another number of processes than was asked for.
    """
    require_trackers(config)
    precision = "bf16" if config.precision == "bf16" else "no"
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise ConfigError(
            f"the launch file asks for mixed precision {asked}, the config for {config.precision}; set it in the config only"
        )
    deepspeed, fsdp = (os.environ.pop(name, "").lower() == "true" for name in (DEEPSPEED, FSDP))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found nothing else
        if "LOCAL_RANK" in os.environ:
            os.environ[ON_CPU] = "true"  # or each process would think that it is alone
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
            # Cast weights that a forward keeps to its end are whole ones: what ranks divide would be on each, after all.
            AutocastKwargs(cache_enabled=not fsdp),
        ],
    )
    if torch.distributed.is_initialized():
        _PROCESS_GROUPS.append(torch.distributed.group.WORLD)
    expected = int(os.environ.get("RLHF_EXPECTED_WORLD_SIZE") or accelerator.num_processes)
    if accelerator.num_processes != expected:
        raise ConfigError(f"{expected} processes were asked for, the launcher started {accelerator.num_processes}")
    if not deepspeed and not fsdp:
        return accelerator, DataParallel(accelerator)
    if not torch.distributed.is_initialized():
        raise ConfigError("the launch file asks for ZeRO or FSDP, and one process has nobody to divide with: give --nproc 2")
    engine = _fsdp(accelerator) if fsdp else _zero(config, accelerator)
    require_fit(config, Named(engine.name, len(engine.divided)))
    return accelerator, engine


def _fsdp(accelerator: Accelerator) -> Engine:
    from rlhf.training.engines.fsdp import FullyShardedDataParallel  # imports what only it needs

    return FullyShardedDataParallel(accelerator)


def _zero(config: Stage, accelerator: Accelerator) -> Engine:
    try:
        from rlhf.training.engines.zero import Zero  # who does not ask for DeepSpeed need not have it
    except ImportError as error:
        raise ConfigError(f"the launch file asks for DeepSpeed: {error}; pip install 'rlhf[deepspeed]'") from error
    named = os.environ.get(DEEPSPEED_FILE)
    if named and (file := shipped_or_own(named)):
        os.environ[DEEPSPEED_FILE] = str(file)
    try:
        settings: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    except ValueError as error:
        raise ConfigError(f"the launch file's deepspeed_config: {error}") from error
    micro_batch_size: int = config.micro_batch_size  # pyright: ignore[reportAttributeAccessIssue]
    return Zero(settings, accelerator.device, micro_batch_size, config.precision == "bf16")


class Peer(NamedTuple):
    rank: int
    host: str
    pid: int
    reach: str
    """Equal for processes that see each other's pids; names of hosts may be equal on different ones."""

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @classmethod
    def this(cls, rank: int) -> Peer:
        return cls(rank, socket.gethostname(), os.getpid(), _reach())


def lost(peers: Sequence[Peer], seconds: float = 0.0) -> str:
    """Names a process that this one could see and that is gone, waiting so long for one to be; or an empty string."""
    deadline = time.monotonic() + seconds
    while True:
        for peer in _in_sight(peers):
            if _status(peer.pid) in ("", psutil.STATUS_ZOMBIE):
                return f"{peer} is gone"
        if time.monotonic() >= deadline:
            return ""
        time.sleep(0.05)


def stopped(peers: Sequence[Peer]) -> str:
    """Names a process that this one can see and that a signal has stopped; or an empty string."""
    found = (peer for peer in _in_sight(peers) if _status(peer.pid) == psutil.STATUS_STOPPED)
    return next((f"{peer} is stopped" for peer in found), "")


def _in_sight(peers: Sequence[Peer]) -> list[Peer]:
    return [peer for peer in peers if peer.reach == _reach()]


def _reach() -> str:
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text()}{namespace.readlink()}" if boot.exists() else socket.gethostname()


def _status(pid: int) -> str:
    """As psutil says it; empty for a process that is not there."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return ""
