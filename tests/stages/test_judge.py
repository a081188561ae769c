"""The judge of `rlhf eval --against`: asked in both orders, told where it fails, ended with the command."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.config.commands import Judge
from rlhf.errors import ConfigError, DataError, StorageError
from rlhf.training.evaluation.judge import Pair, verdicts


def judge(directory: Path, body: str) -> str:
    """The command of a judge; `body` says what it answers to `row`."""
    lines = [
        "import json, sys",
        "for line in sys.stdin:",
        "    row = json.loads(line)",
        *(f"    {line}" for line in body.split("\n")),
    ]
    (directory / "judge.py").write_text("\n".join(lines) + "\n")
    return f"{sys.executable} '{directory / 'judge.py'}'"


LONGER = "print('a' if len(row['a']) > len(row['b']) else 'b' if len(row['a']) < len(row['b']) else 'tie')"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_judge_too(tmp_path, number):
    """With what it started; its group is not that of the command, so nobody else would."""
    command = judge(tmp_path, f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    body = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's `&` has it ignored
    body += "; from rlhf.training.evaluation.judge import ask; ask(sys.argv[1:], [{'a': 'x', 'b': 'y'}], 60)"
    process = subprocess.Popen([sys.executable, "-c", body, *shlex.split(command)], stderr=subprocess.DEVNULL)
    waited = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None
        assert time.monotonic() < waited
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)  # it is there
    process.send_signal(number)
    assert process.wait(60) == -number
    while time.monotonic() < waited and (state := running(pid)):
        time.sleep(0.05)
    assert not state


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As under nohup: the judge goes on, and answers."""
    command = judge(tmp_path, "import os, signal; os.kill(os.getppid(), signal.SIGHUP); print('a')")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert verdicts(Judge(command=command), pairs()[:1]).asked == 1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def running(pid: int) -> bool:
    """A zombie that nobody has asked about is none."""
    said = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(said) and not said.startswith("Z")


def pairs() -> list[Pair]:
    return [Pair("p", "long one", "short"), Pair([{"role": "user", "content": "q"}], "é", "longer"), Pair("r", "same", "same")]


@pytest.mark.parametrize(
    ("body", "outcomes", "agreed", "first"),
    [
        (LONGER, [1, 0, 0.5], 2, 0.5),
        ("print('a')", [0.5, 0.5, 0.5], 0, 1.0),  # it likes what stands first
        ("print('b')", [0.5, 0.5, 0.5], 0, 0.0),
        ("print('tie')", [0.5, 0.5, 0.5], 2, 0.5),
        ("print('a' if row['a'] == 'long one' else 'tie')", [0.5, 0.5, 0.5], 1, 1.0),  # one order a win, the other a tie
        ("print('a' if 'é' in row['a'] else 'b' if 'é' in row['b'] else 'tie')", [0.5, 1, 0.5], 2, 0.5),
        ("print('a' if isinstance(row['prompt'], str) else 'tie')", [0.5, 0.5, 0.5], 1, 1.0),
    ],
)
def test_both_orders_must_agree(tmp_path, body, outcomes, agreed, first):
    found = verdicts(Judge(command=judge(tmp_path, body)), pairs())
    assert found == (outcomes, 2, agreed, first)


def test_two_replies_that_are_the_same_are_not_asked_about(tmp_path):
    found = verdicts(Judge(command=judge(tmp_path, "sys.exit(3)")), pairs()[2:])
    assert found == ([0.5], 0, 0, 0.5)


@pytest.mark.parametrize(
    ("body", "timeout_s", "error", "message"),
    [
        ("print('A')", 60, DataError, "line 1 of its answers is 'A', expected a, b, tie"),
        ("print('a'); print('', end='')", 60, None, ""),
        ("print('a'); print()", 60, DataError, "line 2 of its answers is ''"),
        ("print('a'); print('b')", 60, DataError, "8 answers to 4 lines"),
        ("pass", 60, DataError, "0 answers to 4 lines"),
        ("sys.exit('no key')", 60, DataError, "ended with exit code 1: no key"),
        ("import time; time.sleep(60)", 0.3, StorageError, "no answer to 4 lines within 0.3 s; raise judge.timeout_s"),
        ("import os; os.fork() or __import__('time').sleep(60); sys.exit(0)", 0.3, StorageError, "within 0.3 s"),
    ],
)
def test_a_judge_that_fails_is_told(tmp_path, body, timeout_s, error, message):
    asked = Judge(command=judge(tmp_path, body), timeout_s=timeout_s)
    if error is None:
        assert verdicts(asked, pairs()).asked == 2
        return
    with pytest.raises(error) as caught:
        verdicts(asked, pairs())
    assert message in str(caught.value)


@pytest.mark.parametrize("command", ["no-such-judge --all", "", "judge 'open"])
def test_a_judge_that_is_none(command):
    with pytest.raises(ConfigError, match=r"judge\.command: "):
        verdicts(Judge(command=command), pairs())
