"""Who is better, asked of a command: it reads {"prompt", "a", "b"} lines and answers a, b or tie, a line each.

Judges prefer what stands first, or last (Zheng et al. 2023, arXiv:2306.05685, section 3.3), so each pair is asked about in both
orders, and where the two answers do not agree it is a tie, as there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple

from rlhf.config.commands import Judge
from rlhf.errors import ConfigError, DataError, StorageError

ANSWERS = ("a", "b", "tie")
SWAPPED = {"a": "b", "b": "a", "tie": "tie"}
WORTH = {"a": 1.0, "b": 0.0, "tie": 0.5}


class Pair(NamedTuple):
    prompt: Any
    """As its row has it: text, or messages."""
    a: str
    b: str


class Verdicts(NamedTuple):
    outcomes: list[float]
    """Of each pair: 1 where a is better, 0 where b is, 0.5 for a tie."""
    asked: int
    """Pairs whose replies differ; of two that are the same nobody is asked."""
    agreed: int
    """Pairs of which both orders were answered alike."""
    first: float
    """Part of the answers other than tie that were for the reply shown first: 0.5 of a judge who does not mind, or of none."""


def command_of(judge: Judge) -> list[str]:
    """The words of the command. Raises ConfigError where there is no such command, before any model is opened."""
    try:
        words = shlex.split(judge.command or "")
    except ValueError as error:
        raise ConfigError(f"judge.command: {error}: {judge.command}") from None
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(
            f"judge.command: there is no command {(words or [''])[0]!r}; give one that can be run, with its words"
        )
    return words


def verdicts(judge: Judge, pairs: Sequence[Pair]) -> Verdicts:
    """Raises DataError or StorageError as `ask`."""
    differ = [place for place, pair in enumerate(pairs) if pair.a != pair.b]
    lines = [pairs[place]._asdict() for place in differ]
    lines += [{"prompt": line["prompt"], "a": line["b"], "b": line["a"]} for line in lines]
    answers = ask(command_of(judge), lines, judge.timeout_s) if lines else []
    outcomes, agreed = [0.5] * len(pairs), 0
    for place, one, other in zip(differ, answers[: len(differ)], answers[len(differ) :], strict=True):
        if one == SWAPPED[other]:
            agreed += 1
            outcomes[place] = WORTH[one]
    decided = [answer for answer in answers if answer != "tie"]
    return Verdicts(outcomes, len(differ), agreed, decided.count("a") / len(decided) if decided else 0.5)


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """What ends this process, too, ends the judge, which is of another group and would go on."""

    def end(number: int, _: FrameType | None) -> None:
        _end(process)
        signal.signal(number, before[signal.Signals(number)])
        signal.raise_signal(number)

    ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]  # by nohup
    before = {number: signal.signal(number, end) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(process.pid, signal.SIGKILL)


def ask(words: Sequence[str], lines: Sequence[dict[str, Any]], timeout_s: float) -> list[str]:
    """The answers to all lines, in their order.

    Raises:
        DataError: the command fails, or what it prints is not an answer a line.
        StorageError: it does not end in time; it is ended then, with all that it started.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        pipe = subprocess.PIPE
        # A group of its own, so that what it starts is ended with it.
        process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise ConfigError(f"judge.command: {words[0]} cannot be run: {error.strerror}") from None
    with process, _ended_with_us(process):
        try:
            out, err = process.communicate(text.encode(), timeout_s)
        except BaseException as error:  # its time is up, or Ctrl-C wants us to stop
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            late = f"no answer to {len(lines)} lines within {timeout_s:g} s; raise judge.timeout_s, or give fewer prompts"
            raise StorageError(f"judge {words[0]}: {late}") from None
    if process.returncode:
        said = err.decode(errors="replace").strip().splitlines() or ["it said nothing on standard error"]
        raise DataError(f"judge {words[0]}: ended with exit code {process.returncode}: {said[-1]}")
    answers = [line.strip() for line in out.decode(errors="replace").splitlines()]
    for number, answer in enumerate(answers, start=1):
        if answer not in ANSWERS:
            raise DataError(f"judge {words[0]}: line {number} of its answers is {answer[:60]!r}, expected {', '.join(ANSWERS)}")
    if len(answers) != len(lines):
        raise DataError(f"judge {words[0]}: {len(answers)} answers to {len(lines)} lines; expected one each, and nothing else")
    return answers
