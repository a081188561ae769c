"""Every bad config through the command itself: one complete message, its exit code, at once, nothing loaded or written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bad_configs import BAD_FLAGS, BAD_VALUES, BAD_WORDS, DEEPSPEED_FILES, FILES, GOOD, STAGE_CASES, UNREADABLE

SECONDS = 3.0  # of CPU: what others do on the machine is not the command's
REQUIRED = {
    "sft": ["--output=run", "--model=model", "--data=rows.jsonl"],
    "rm": ["--output=run", "--model=model", "--data=rows.jsonl"],
    "dpo": ["--output=run", "--model=model", "--data=rows.jsonl"],
    "kto": ["--output=run", "--model=model", "--data=rows.jsonl"],
    "ppo": ["--output=run", "--actor=model", "--reward=count:a", "--critic=zero", "--data=rows.jsonl"],
}

# Runs each command in one process without torch and notes what it said, how long it took and what there was then.
DRIVER = """
import contextlib, io, json, sys, time
from pathlib import Path
from rlhf.cli import main
from rlhf.runs import launch
launch.run = lambda *_, **__: 99  # a config that passes is told by this code, not by a stage that starts
outcomes = []
for argv in json.load(sys.stdin):
    out, err, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    heavy = sorted({"torch", "transformers", "accelerate", "datasets"} & set(sys.modules))
    left = sorted(path.name for path in Path().iterdir())
    outcomes.append([code, err.getvalue(), out.getvalue(), time.process_time() - start, heavy, left])
json.dump(outcomes, sys.stdout)
"""


def cases(directory: Path) -> list[tuple[list[str], str]]:
    """(command line, what it says); writes the files they name."""
    found: list[tuple[list[str], str]] = []
    for number, (text, place, message) in enumerate(BAD_VALUES):
        (directory / f"value-{number}.yaml").write_text(GOOD + text)
        found.append((["ppo", f"--config=value-{number}.yaml"], f"value-{number}.yaml:{place}: |{message}"))
    for number, (content, message) in enumerate(UNREADABLE):
        (directory / f"file-{number}.yaml").write_bytes(content)
        found.append((["ppo", f"--config=file-{number}.yaml"], message))
    (directory / "good.yaml").write_text(GOOD)
    found += [(["ppo", "--config=good.yaml", f"--{name}={text}"], message) for (name, text), message in BAD_FLAGS]
    found += [(["ppo", *words], message) for words, message in BAD_WORDS]
    for name, content in FILES.items():
        (directory / f"{name}.yaml").write_bytes(content)
    for name, content in DEEPSPEED_FILES.items():
        (directory / name).write_bytes(content)
    for stage, words, message in STAGE_CASES:
        words = [word.replace("=@", "=") + ".yaml" if "=@" in word else word for word in words]
        given = {word.split("=")[0] for word in words}
        required = [] if "--unit-test" in given or "belongs to ppo" in message else REQUIRED[stage]
        if "NUL" in message:
            required = required[1:]
        found.append(([stage, *(word for word in required if word.split("=")[0] not in given), *words], message))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad")
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text("{}")
    (directory / "rows.jsonl").write_text('{"prompt": "a"}\n')
    return directory


@pytest.fixture(scope="module")
def tried(place: Path) -> list[tuple[list[str], str, list]]:
    asked = cases(place)
    commands = [argv for argv, _ in asked]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(argv, message, outcome) for (argv, message), outcome in zip(asked, json.loads(done.stdout), strict=True)]


def test_there_are_many(place: Path) -> None:
    argvs = [" ".join(argv) for argv, _ in cases(place)]
    assert len(set(argvs)) >= 150


def test_each_gives_its_message_and_its_code(tried: list) -> None:
    wrong = [
        (argv, message, code, said)
        for argv, message, (code, said, *_) in tried
        if code not in (2, 78)
        or not said.startswith("rlhf: error: ")
        or "Traceback" in said
        or not any(all(part in line for part in message.split(": |")) for line in said.splitlines())
    ]
    assert wrong == []


def test_each_is_told_at_once_with_nothing_loaded(tried: list) -> None:
    assert [(argv, seconds) for argv, _, (*_, seconds, _, _) in tried if seconds > SECONDS] == []
    assert [(argv, heavy) for argv, _, (*_, heavy, _) in tried if heavy] == []


def test_nothing_is_printed_or_written(place: Path, tried: list) -> None:
    assert [(argv, printed) for argv, _, (_, _, printed, *_) in tried if printed] == []
    before = tried[0][2][-1]
    assert [argv for argv, _, outcome in tried if outcome[-1] != before] == []
    assert not (place / "run").exists()


def test_a_good_config_gets_further(place: Path) -> None:
    """The negative control: without a mistake the same flags pass."""
    for stage, required in REQUIRED.items():
        done = subprocess.run(
            [sys.executable, "-m", "rlhf", stage, *required, "--dry-run"],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
