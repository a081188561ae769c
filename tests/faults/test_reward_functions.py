"""A user's reward function that raises, hangs, dies or returns nonsense: the run ends with a word, in time, and alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf.errors import DataError
from rlhf.rollout.functions import FunctionProcess
from rlhf.rollout.readers import checked_scores

PROMPTS, RESPONSES = ["a", "b"], ["x y", "z"]
ROOM_S = 5
"""What a deadline may be missed by."""

pytestmark = pytest.mark.usefixtures("started")

MODULE = """
from __future__ import annotations
import collections, ctypes, fractions, json, os, random, sys, threading, time
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Text:  # looks its own module up
    words: int

HERE = Path(__file__).parent
ALREADY = HERE / "already"

def lengths(responses):
    return [len(response) for response in responses]

def raises(prompts, responses):
    table = {}
    return [table[response] for response in responses]

def deep(responses):
    return [json.loads("{") for _ in responses]

def raises_once(responses):
    if not ALREADY.exists():
        ALREADY.touch()
        raise OSError("busy {now}")
    return lengths(responses)

def dies_once(responses):
    if not ALREADY.exists():
        ALREADY.touch()
        os._exit(3)
    return lengths(responses)

def loops(responses):
    while True:
        pass

def sleeps(responses):
    time.sleep(1000)

def exits(responses):
    os._exit(3)

def leaves(responses):
    sys.exit(4)

def crashes(responses):
    ctypes.string_at(0)

def hangs_with_family(responses):
    if os.fork() == 0:
        time.sleep(1000)
    (HERE / "family").write_text("here")
    time.sleep(1000)

def chatters(responses):
    for _ in range(20000):
        print("x" * 100)
    os.write(1, b"straight to descriptor 1")
    return lengths(responses)

def draws(responses):
    return [random.random() for _ in responses]

def is_main(responses):
    return [threading.current_thread() is threading.main_thread(), os.getppid() == int(os.environ.get("TRAINER", 0))]

def environment(responses):
    return [float(os.environ["RANK"])] * len(responses)

def values(value):
    return lambda responses: value

def deque(responses):
    return collections.deque([fractions.Fraction(1, 2), True])

def numbers(responses):
    import numpy, torch
    return [numpy.float32(0.1), torch.tensor([0.5], requires_grad=True)]

def array(responses):
    import numpy
    return numpy.array([0.1, 2], dtype=numpy.float32)

def generator(responses):
    return (1.0 for _ in responses)

short = values([1.0])
none, number, text, mapping = values(None), values(1.0), values("12"), values({"a": [1.0, 2.0]})
some_none, some_text, some_thing = values([1.0, None]), values(["1.0", 2]), values([1.0, Text(3)])
nan, inf = values([1.0, float("nan")]), values([float("-inf"), 1.0])
huge, digits = values([1e39, 1.0]), values([1.0, 10**5000])
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path / "mine.py"


def line(file: Path, text: str) -> int:
    return file.read_text().split(text)[0].count("\n") + 1


def call(file: Path, name: str, timeout_s: float = 60, retries: int = 2):
    """What a run would make of it."""
    function = FunctionProcess(f"{file}:{name}", timeout_s, retries)
    try:
        return checked_scores(function(PROMPTS, RESPONSES), len(RESPONSES), function.source)
    finally:
        function.close()


def test_scores_are_what_the_function_returned(file):
    assert call(file, "lengths") == [3.0, 1.0]
    assert call(file, "deque") == [0.5, 1.0]
    assert call(file, "some_none") == [1.0, None]


@pytest.mark.slow
def test_numbers_of_numpy_and_torch(file):
    assert call(file, "numbers") == [0.10000000149011612, 0.5]  # float32(0.1), as a double
    assert call(file, "array") == [0.10000000149011612, 2.0]


@pytest.mark.parametrize("name", ["raises_once", "dies_once"])
def test_what_fails_once_is_tried_again(file, name, capfd):
    assert call(file, name) == [3.0, 1.0]
    assert "(try 1 of 3); tried again" in capfd.readouterr().err
    (file.parent / "already").unlink()
    with pytest.raises(DataError, match=r"\(try 1 of 1\); the call was for replies 0 to 1 of this process"):
        call(file, name, retries=0)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (
            "raises",
            r"raised KeyError at {file}:{line}: 'x y' \(try 3 of 3\); the call was for replies 0 to 1 of this process; mend",
        ),
        ("deep", r"raised JSONDecodeError at {file}:{deep}: "),
        ("exits", r"its process ended with exit code 3 \(try 3 of 3"),
        ("leaves", r"its process ended with exit code 4 \(try 3 of 3"),
        ("crashes", r"its process ended by signal 11 \(Segmentation fault\) \(try 3 of 3"),
    ],
)
def test_what_fails_always_ends_the_run(file, name, how):
    how = how.format(file=file, line=line(file, "return [table[response]"), deep=line(file, "return [json.loads"))
    with pytest.raises(DataError, match=f"mine.py:{name}: {how}"):
        call(file, name)


@pytest.mark.parametrize("name", ["loops", "sleeps"])
def test_what_hangs_has_a_deadline(file, name):
    function, start = FunctionProcess(f"{file}:{name}", timeout_s=1, retries=1), time.monotonic()
    with pytest.raises(DataError, match=rf"mine.py:{name}: gave no answer within 1 s \(reward.timeout_s\) \(try 2 of 2"):
        function(PROMPTS, RESPONSES)
    assert 2 <= time.monotonic() - start < 2 + ROOM_S
    assert function.child is None


def test_what_hangs_takes_its_own_children_along(file, started):
    function = FunctionProcess(f"{file}:hangs_with_family", timeout_s=1, retries=0)
    assert len(started()) == 1
    with pytest.raises(DataError, match="gave no answer"):
        function(PROMPTS, RESPONSES)
    assert (file.parent / "family").exists()
    time.sleep(0.1)
    assert started() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "returned 1 values, expected a list of 2 numbers"),
        ("none", "returned NoneType, expected a list of 2 numbers"),
        ("number", "returned float, expected a list of 2 numbers"),
        ("text", "returned str, expected a list of 2 numbers"),
        ("generator", "returned generator, expected a list of 2 numbers"),
        ("mapping", "returned dict, expected a list of 2 numbers"),
        ("some_text", "the score of reply 0 is '1.0', expected a number"),
        ("some_thing", r"the score of reply 1 is 'Text Text\(words=3\)', expected a number"),
        ("huge", r"the score of reply 0 is 1e\+39, more than float32 holds"),
        ("digits", "the score of reply 1 is 'int beyond any float', expected a number"),
    ],
)
def test_nonsense_ends_the_run_at_once(file, name, message, capfd):
    with pytest.raises(DataError, match=f"mine.py:{name}: {message}"):
        call(file, name)
    assert "tried again" not in capfd.readouterr().err


def test_prints_are_not_answers(file, capfd):
    assert call(file, "chatters") == [3.0, 1.0]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("x" * 100) == 20000
    assert "straight to descriptor 1" in err


def test_a_function_draws_the_same_for_the_same_replies(file):
    assert call(file, "draws") == call(file, "draws")
    function = FunctionProcess(f"{file}:draws")
    assert function(PROMPTS, RESPONSES) != function(PROMPTS, RESPONSES[::-1])
    function.close()


def test_it_is_a_child_like_any_other(file, monkeypatch):
    monkeypatch.setenv("TRAINER", str(os.getpid()))
    monkeypatch.setenv("RANK", "7")
    assert call(file, "is_main") == [1.0, 1.0]
    assert call(file, "environment") == [7.0, 7.0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.such.module:f", "cannot import 'no.such.module': ModuleNotFoundError: No module named 'no'"),
        ("nowhere.py:f", "cannot import 'nowhere.py': FileNotFoundError"),
        ("mine.py:f", "mine.py has no function 'f'"),
        ("mine.py:HERE", "mine.py has no function 'HERE'"),
        ("broken.py:f", r"cannot import 'broken.py': ZeroDivisionError at \S*broken.py:2: division by zero"),
        ("broken.py:g", r"cannot import 'broken.py': ZeroDivisionError"),
        ("typo.py:f", r"cannot import 'typo.py': SyntaxError: .*typo.py, line 1"),
        ("leaves.py:f", "as it was loaded, its process ended with exit code 5"),
        ("hangs.py:f", r"cannot be loaded within 1 s \(reward.timeout_s\)"),
    ],
)
def test_a_mistake_is_told_when_it_is_loaded(source, message, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    for name, text in {
        "broken": "def f(responses): ...\n1 / 0\n",
        "typo": "def f(:\n",
        "leaves": "import sys\nsys.exit(5)",
        "hangs": "import time\ntime.sleep(1000)",
    }.items():
        Path(f"{name}.py").write_text(text)
    with pytest.raises(DataError, match=f"{source}: {message}"):
        FunctionProcess(source, timeout_s=1 if source.startswith("hangs") else 60)


def test_a_module_is_found_as_the_trainer_would(tmp_path, monkeypatch):
    """The trainer's path, and no directory more: a file beside the run may bear the name of a module of Python's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my_rewards.py").write_text("import random\n\ndef f(responses):\n    return [1.0, 2.0]\n")
    (tmp_path / "random.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    function = FunctionProcess("my_rewards:f")
    assert function(PROMPTS, RESPONSES) == [1.0, 2.0]
    function.close()


def test_it_starts_without_torch(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import sys\ndef f(responses):\n    return ['torch' in sys.modules, 'rlhf' in sys.modules]\n"
    )
    assert call(tmp_path / "mine.py", "f") == [0.0, 0.0]


TRAINER = """
import sys
from rlhf.rollout.functions import FunctionProcess
function = FunctionProcess(sys.argv[1])
print(function.child.process.pid, flush=True)
if sys.argv[2] == "call":
    function(["a"], ["b"])
elif sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "doing", "kill"), [("loops", "call", True), ("lengths", "wait", True), ("lengths", "end", False)]
)
def test_it_ends_with_the_trainer(file, name, doing, kill):
    arguments = [sys.executable, "-c", TRAINER, f"{file}:{name}", doing]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        child = psutil.Process(int(trainer.stdout.readline()))
        if kill:
            time.sleep(0.5)
            assert child.is_running()
            trainer.send_signal(signal.SIGKILL)
        assert trainer.wait(60) == (-signal.SIGKILL if kill else 0)
    child.wait(ROOM_S)
