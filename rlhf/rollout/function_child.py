"""The process a user's function runs in, apart from the trainer: it may raise, hang or die, and the run still ends with a word.

Run as a file of its own, from the standard library alone. It speaks length-prefixed JSON over the socket that is its only
argument but one; what the function prints goes to the trainer's standard error. functions.py is the other end.

    trainer                                                     child
    {"path": sys.path, "source": ...}                     ->
                                                          <-    {"takes": {parameter: whether it must be given}}
                                                                or {"problem": why it cannot be called}
    {"seed": n, "arguments": {name: [...]}}               ->
                                                          <-    {"scores": [...]}, {"columns": {name: [...]}},
                                                                {"not_a_list": type} or {"raised": {...}}
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.util
import inspect
import json
import os
import random
import reprlib
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("!Q")
PR_SET_PDEATHSIG = 1  # prctl(2)


def frame(message: Any) -> bytes:
    """The message as it goes over the socket: its length in bytes, then JSON (in which NaN and Infinity are words)."""
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def read_message(receive: Callable[[int], bytes]) -> Any:
    """The next message; `receive(n)` returns at most n bytes, and none at the end. Raises: EOFError: it ends before one."""
    (length,) = LENGTH.unpack(_exactly(LENGTH.size, receive))
    return json.loads(_exactly(length, receive))


def _exactly(count: int, receive: Callable[[int], bytes]) -> bytes:
    pieces = []
    while count:
        piece = receive(min(count, 1 << 20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def load_function(source: str) -> tuple[Callable[..., Any], dict[str, bool]]:
    """The function that `module:function` or `file.py:function` names, and its parameters: whether each must be given.

    Raises:
        ValueError: it is not there, or is none; the message says so.
    """
    place, _, name = source.rpartition(":")
    try:
        module = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's own module does
        raise ValueError(f"cannot import {place!r}: {type(error).__name__}{_where(error, place)}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{place} has no function {name!r}")
    wanted = inspect.signature(function).parameters  # raises a ValueError itself for what has none to be read
    optional_kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return function, {key: p.default is p.empty for key, p in wanted.items() if p.kind not in optional_kinds}


def _module_of_file(place: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses and worker processes look for it there
    spec.loader.exec_module(module)
    return module


def call_by_name(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls it with those of the arguments that it names."""
    wanted = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in wanted})


def answer(function: Callable[..., Any], source: str, seed: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    _seed(seed)
    try:
        returned = call_by_name(function, arguments)
        if isinstance(returned, Mapping):
            return {"columns": {str(name): _plain_list(column) for name, column in returned.items()}}
        scores = _plain_list(returned)
        return {"not_a_list": type(returned).__name__} if scores is None else {"scores": scores}
    except Exception as error:  # the user's own code: the message says where in it
        place = source.rpartition(":")[0]
        return {"raised": {"type": type(error).__name__, "where": _where(error, place), "message": str(error)}}


def _plain_list(values: Any) -> list[Any] | None:
    """Numbers as JSON has them; None for what is no list."""
    if hasattr(values, "tolist"):  # of numpy, torch or pandas
        values = values.tolist()
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        return None
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A float with the very same value; what is no number stays None or becomes text, for the trainer to refuse by name."""
    if hasattr(value, "item"):  # a number of torch or numpy, in an array of its own perhaps
        with suppress(ValueError, RuntimeError):  # more than one
            value = value.item()
    if isinstance(value, Real):
        try:
            return float(value)
        except OverflowError:
            return f"{type(value).__name__} beyond any float"
    return value if value is None or isinstance(value, str) else f"{type(value).__name__} {reprlib.repr(value)}"


def _where(error: BaseException, place: str) -> str:
    """` at file:line`: the innermost line of the user's own file, or of anything where none of it took part."""
    frames = traceback.extract_tb(error.__traceback__)
    module = sys.modules.get(place)
    file = os.path.realpath(getattr(module, "__file__", None) or place)
    theirs = [entry for entry in frames if os.path.realpath(entry.filename) == file]
    machinery = (__file__, importlib.__file__, "<frozen")
    others = [entry for entry in frames if not entry.filename.startswith(machinery)]
    found = (theirs or others)[-1:]
    return f" at {found[0].filename}:{found[0].lineno}" if found else ""


def _seed(seed: int) -> None:
    """A function that draws draws the same on every try, and in a resumed run."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _end_with(parent: int) -> None:
    """The kernel ends this process with the thread that started it, even where the user's code never comes back.

    Elsewhere than on Linux it ends at the next message that does not come.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel was told
        os._exit(1)


def main(descriptor: int, parent: int) -> None:
    _end_with(parent)
    faulthandler.enable()
    os.set_inheritable(descriptor, False)
    trainer = socket.socket(fileno=descriptor)
    hello = read_message(trainer.recv)
    sys.path[:] = hello["path"]
    try:
        function, takes = load_function(hello["source"])
    except ValueError as error:
        trainer.sendall(frame({"problem": str(error)}))
        return
    trainer.sendall(frame({"takes": takes}))
    while True:
        try:
            request = read_message(trainer.recv)
        except EOFError:
            return
        trainer.sendall(frame(answer(function, hello["source"], request["seed"], request["arguments"])))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
