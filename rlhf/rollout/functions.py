"""The user's function, called in a process of its own: it cannot take the trainer with it, nor keep it waiting for ever."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import psutil
import torch

from rlhf.digest import text_digest
from rlhf.errors import DataError
from rlhf.rollout import function_child
from rlhf.rollout.function_child import frame, read_message
from rlhf.rollout.tries import FailedTry, with_retries

OFFERED = ("prompts", "responses", "tokens", "finished", "where")
"""What there is of every reply: texts, the reply's token ids, whether it ended by itself, the place of its prompt in a file.
Any other parameter that must be given is a column of the prompt rows."""


class FunctionFailed(DataError):
    """It raised, hung or died on every try."""


class FunctionProcess:
    """`module:function` or `file.py:function`, in a child that lives as long as this object, and no longer than the trainer.

    Args:
        source: what it is called in messages; and where it is, unless `place` says so.
        timeout_s: seconds for loading the function, and for each call of it.
        retries: how often a call that raises, hangs or dies is made again, with the same arguments.
        columns: parameter -> the column of the prompt rows that it is, where their names differ.

    Raises:
        DataError: the function is not there.
    """

    def __init__(
        self,
        source: str,
        timeout_s: float = 60.0,
        retries: int = 2,
        place: str | None = None,
        columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.source, self.timeout_s, self.retries, self.place = source, timeout_s, retries, place or source
        self.takes: dict[str, bool] = {}
        self.child: Child | None = self._start()
        self.column_of = {name: columns.get(name, name) for name, must in self.takes.items() if must and name not in OFFERED}

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the prompt rows that it asks for."""
        return list(self.column_of.values())

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **others: Sequence[Any]) -> Any:
        """What the function returned: a list, or a dict of lists, of floats and of what the function took for numbers.

        Args:
            others: the rest of `OFFERED` and the columns, by name; the function is given those that it takes.

        Raises:
            FunctionFailed: it failed on every try.
            DataError: it returned no list.
        """
        arguments: dict[str, list[Any]] = {"prompts": list(prompts), "responses": list(responses)}
        arguments |= {name: list(others[name]) for name in self.takes if name in OFFERED and name in others}
        arguments |= {name: list(others[column]) for name, column in self.column_of.items()}
        try:
            text = json.dumps(arguments)
        except TypeError as error:
            raise DataError(f"{self.source}: a column it asks for holds what JSON has no word for: {error}") from None
        request = {"seed": int(text_digest(text)[:16], 16) >> 1, "arguments": arguments}
        try:
            answer = with_retries(self.source, self.retries, lambda: self._ask(request))
        except FailedTry as failure:
            what = f"the call was for replies 0 to {len(responses) - 1} of this process"
            advice = "; mend the function" if self.place == self.source else ""
            raise FunctionFailed(f"{failure}; {what}{advice}") from None
        if "not_a_list" in answer:
            raise DataError(f"{self.source}: returned {answer['not_a_list']}, expected a list of {len(responses)} numbers")
        return answer["scores"] if "scores" in answer else answer["columns"]

    def close(self) -> None:
        if self.child is not None:
            self.child.end()
            self.child = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.child is None:
            self.child = self._start()
        try:
            answer = self.child.exchange(request, self.timeout_s)
        except TimeoutError:
            self._kill()
            raise FailedTry(f"gave no answer within {self.timeout_s:g} s (reward.timeout_s)") from None
        except (EOFError, OSError):
            raise FailedTry(f"its process ended {self._how_it_ended()}") from None
        except BaseException:  # a signal's: the answer may still come, and is not to be taken for the next one's
            self._kill()
            raise
        if raised := answer.get("raised"):
            raise FailedTry("raised {type}{where}: {message}".format(**raised))
        return answer

    def _start(self) -> Child:
        self.child = Child()
        try:
            answer = self.child.exchange({"path": sys.path, "source": self.place}, self.timeout_s)
        except TimeoutError:
            self._kill()
            raise DataError(f"{self.source}: cannot be loaded within {self.timeout_s:g} s (reward.timeout_s)") from None
        except (EOFError, OSError):
            raise DataError(f"{self.source}: as it was loaded, its process ended {self._how_it_ended()}") from None
        if problem := answer.get("problem"):
            self.close()
            raise DataError(f"{self.source}: {problem}")
        self.takes = answer["takes"]
        return self.child

    def _kill(self) -> None:
        assert self.child is not None
        self.child.end(patience_s=0)
        self.child = None

    def _how_it_ended(self) -> str:
        assert self.child is not None
        code = self.child.end()
        self.child = None
        return f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"


class Child:
    """One process, and the socket to it. It is started anew, not forked: the trainer has threads, locks and process groups."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            # -P: or a module beside the child's file could stand before one of Python's; its path is to be the trainer's
            self.process = subprocess.Popen(
                [sys.executable, "-P", function_child.__file__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # what it starts itself is ended with it; Ctrl-C is the trainer's to handle
                env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            )
        self._end = weakref.finalize(self, _end, os.getpid(), self.process, self.socket)

    def exchange(self, message: Any, seconds: float) -> Any:
        """Raises: TimeoutError; EOFError or OSError: the process is gone."""
        deadline = time.monotonic() + seconds
        self.socket.settimeout(seconds)
        self.socket.sendall(frame(message))

        def receive(count: int) -> bytes:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            return self.socket.recv(count)

        return read_message(receive)

    def end(self, patience_s: float = 1.0) -> int:
        """Its exit code, or minus the signal that ended it."""
        if self._end.detach():
            _end(os.getpid(), self.process, self.socket, patience_s)
        return self.process.wait()


def _end(owner: int, process: subprocess.Popen[bytes], to_it: socket.socket, patience_s: float = 1.0) -> None:
    """Ends it and all that it started, by force where it does not end by itself in time. Reaped last: until then its number,
    which is its group's, cannot be another's."""
    if os.getpid() != owner:  # a fork has a copy of the object, not the child
        return
    to_it.close()
    deadline = time.monotonic() + patience_s
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
