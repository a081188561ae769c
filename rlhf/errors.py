"""The mistakes a user can make, each with the exit code the command ends with.

Every error is one message a person can act on: where (file:line or field), what was expected, the likely fix.
Only a bug of our own ends in a traceback (exit code 70).
"""

from __future__ import annotations

import errno
import re

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""What the system says of a disk that is full, over quota, failing, or gone read-only."""


class RlhfError(Exception):
    """Base of every error we raise on purpose; `exit_code` follows sysexits.h where it has a meaning for us."""

    exit_code = 1


class CheckFailed(RlhfError):
    """A self-check of a run (an invariant, a learning probe) did not hold."""

    exit_code = 1


class UsageError(RlhfError):
    """The command line itself makes no sense."""

    exit_code = 2


class DataError(RlhfError):
    """A data file, model directory or checkpoint does not hold what it should."""

    exit_code = 65


class OutOfMemory(RlhfError):
    """The device or the machine ran out of memory."""

    exit_code = 71


class OutputError(RlhfError):
    """The output directory cannot be created or written."""

    exit_code = 73


class StorageError(RlhfError):
    """Reading or writing failed half-way (disk full, I/O error, a service that gives no answer)."""

    exit_code = 74


def disk_failed(error: BaseException) -> bool:
    """Whether it is the disk that is full or fails. safetensors tells the system's number in its text only."""
    if isinstance(error, OSError):
        return error.errno in DISK
    told = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return told is not None and int(told[1]) in DISK


class LostRank(RlhfError):
    """Another process of the run is gone or does not answer; the last checkpoint is where the run goes on."""

    exit_code = 74

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}; run the same command again to go on from the last checkpoint")


class Locked(RlhfError):
    """Another run is writing into the same directory."""

    exit_code = 75


class ConfigError(RlhfError):
    """The configuration is wrong; the message lists every mistake, one a line."""

    exit_code = 78


class Preempted(RlhfError):
    """A signal asked the run to stop; its state is saved and the same command goes on from there."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; run the same command again to go on")
        self.exit_code = 128 + signal_number
