"""The mistakes a user can make, each with the exit code the command ends with.

Every error is one message a person can act on: where (file:line or field), what was expected, the likely fix.
Only a bug of our own ends in a traceback (exit code 70).
"""

from __future__ import annotations

import errno
import os
import re

USERINFO = re.compile(r"(:/{1,2})[^/?#\s]+@")
"""What stands before the host in a URL (RFC 3986, section 3.2.1): a user, a password, or a token in place of both. Where the
URL was taken for a path, one of its slashes is gone."""
SECRET = re.compile(r"TOKEN(?!IZ|S)|SECRET|PASSW(OR)?D|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
"""In the name of an environment variable whose value nobody else may read."""
SHORTEST_SECRET = 8
"""Characters; shorter values are settings (`true`), and stand in texts by chance."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
"""What the system says of a disk that is full, over quota, failing, gone read-only, or a server away."""


def without_secrets(text: str) -> str:
    """The text as it may stand in a log: userinfo of URLs and values of secret environment variables are left out."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and SECRET.search(name):
            text = text.replace(value, f"${name}")
    return USERINFO.sub(r"\1***@", text)


class RlhfError(Exception):
    """Base of every error we raise on purpose; `exit_code` follows sysexits.h where it has a meaning for us."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


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

    @classmethod
    def behind(cls, error: BaseException, advice: str) -> OutOfMemory | None:
        """What Python, torch and the libraries beneath them mean by it, each in its own way; None for any other error."""
        said = str(error) or "the machine has no more"
        meant = isinstance(error, RuntimeError | OSError) and any(sign in said for sign in NO_MEMORY)
        if isinstance(error, cls) or not (meant or isinstance(error, MemoryError)):
            return None
        return cls(f"out of memory: {said.splitlines()[0]}\n{advice}")


NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
"""In what CUDA, torch's allocator on a CPU, the kernel (ENOMEM), C++ and cuBLAS say."""


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


class Paused(RlhfError):
    """An alarm asked the run to stop; its state is saved and the same command goes on from there."""

    exit_code = 76


class ConfigError(RlhfError):
    """The configuration is wrong; the message lists every mistake, one a line."""

    exit_code = 78


class Preempted(RlhfError):
    """A signal asked the run to stop; its state is saved and the same command goes on from there."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}; run the same command again to go on")
        self.exit_code = 128 + signal_number
