"""Ends a process by SIGKILL at a chosen one of the calls by which it changes a directory, or looks at all of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from harness import fork, wait

from rlhf.training import checkpoint

EVENTS = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.truncate": None, "shutil.rmtree": 1}
"""Audit events (docs.python.org/3/library/audit_events.html) that change names; the path is their first argument, and here is
which one is the directory that it is relative to."""

WRITERS = [
    (safetensors.torch, "save_file", 1),
    (checkpoint, "save_file", 1),
    (transformers.modeling_utils, "safe_save_file", 1),
    (torch, "save", 1),
]
"""What writes a file in C++ or Rust, where no audit hook sees it: module, name, position of the path."""

Point = Callable[[str, str], None]
"""Is told of every call before it is made: what it is, and the path."""


def watch(root: Path, point: Point) -> None:
    """Calls `point` before each change below the directory, in this process and to its end: audit hooks stay."""

    def told(what: str, path: str) -> None:
        if os.path.abspath(path).startswith(f"{root}/"):
            point(what, path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            told("append" if arguments[2] & os.O_APPEND else "open", arguments[0])
        elif event in EVENTS and not isinstance(arguments[0], int):
            beside = EVENTS[event]
            directory = arguments[beside] if beside and arguments[beside] not in (None, -1) else None
            told(event, os.path.join(_path(directory) if directory is not None else "", os.fspath(arguments[0])))

    sys.addaudithook(hook)
    for name in ("fsync", "pwrite"):
        _announce(os, name, lambda file, *_, name=name: told(name, _path(file)))
    for module, name, place in WRITERS:
        _write_in_two(module, name, place, told)


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _announce(module: Any, name: str, before: Callable[..., None]) -> None:
    right = getattr(module, name)

    def announced(*arguments: Any, **options: Any) -> Any:
        before(*arguments)
        return right(*arguments, **options)

    setattr(module, name, announced)


def _write_in_two(module: Any, name: str, place: int, point: Point) -> None:
    """A process may die before the file is there, and when half of it is."""
    right = getattr(module, name)

    def written(*arguments: Any, **options: Any) -> None:
        path = arguments[place]
        if not isinstance(path, str | os.PathLike):  # into memory
            right(*arguments, **options)
            return
        point("write", os.fspath(path))
        right(*arguments, **options)
        content = Path(path).read_bytes()
        os.unlink(path)
        with open(path, "wb") as half:
            half.write(content[: len(content) // 2])
        point("half", os.fspath(path))
        os.unlink(path)
        Path(path).write_bytes(content)

    setattr(module, name, written)


def killed_at(number: int, root: Path, body: Callable[[Callable[[], None]], object], log: Path) -> bool:
    """Runs `body` in a fork that dies at that call on the directory, counted from where the body calls what it is given.

    False: the body came to its end, there are fewer.
    """
    lock, calls = Lock(), [0]

    def point(what: str, path: str) -> None:
        with lock:
            calls[0] += 1
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    code = wait(fork(body, lambda: watch(root, point), log=log))
    assert code in (0, -signal.SIGKILL), log.read_text()
    return code != 0
