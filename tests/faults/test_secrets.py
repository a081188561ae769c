"""Secrets stay in the environment: no file, no message, no traceback holds one, and a config that does is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import command, flags, fork, run, wait

from rlhf.errors import DataError, without_secrets
from rlhf.training.entry import run_stage

CANARY = "canary-5f0e8a27"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "RLHF_REWARD_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")


@pytest.fixture(autouse=True)
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")


def files_with_canary(directory: Path) -> list[str]:
    return [str(file) for file in directory.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_no_file_of_a_run_holds_one(world: Path, tmp_path: Path, stage: str) -> None:
    more = {"schedule__length": 2, "report__trackers": "tensorboard"} if stage == "sft" else {"schedule__length": 2}
    assert run(stage, flags(stage, world, tmp_path / "run", **more), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert len(list((tmp_path / "run").rglob("*"))) > 10
    assert files_with_canary(tmp_path) == []


def test_a_reward_that_says_its_token_is_not_repeated(world: Path, tmp_path: Path) -> None:
    """As HTTP clients do, which put the URL they asked into their errors."""
    (tmp_path / "asks.py").write_text(
        "import os\n"
        "def score(responses):\n"
        "    raise OSError('401 for https://me:pw@host/?key=' + os.environ['RLHF_REWARD_TOKEN'])\n"
    )
    log = tmp_path / "log"
    assert run("ppo", flags("ppo", world, tmp_path / "run", reward=f"{tmp_path / 'asks.py'}:score"), log) == 65
    assert "raised OSError" in log.read_text()
    assert "https://***@host/?key=$RLHF_REWARD_TOKEN" in log.read_text()
    assert files_with_canary(tmp_path) == []


def test_a_traceback_holds_none(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(invocation: object) -> None:
        try:
            raise KeyError(os.environ["HF_TOKEN"])
        except KeyError as error:
            raise RuntimeError("our own mistake") from error

    monkeypatch.setattr(sys, "argv", ["sft.py", *flags("sft", world, tmp_path / "run")])
    log = tmp_path / "log"
    assert wait(fork(run_stage, "sft", bug, log=log)) == 70
    assert "RuntimeError: our own mistake" in log.read_text()
    assert "KeyError: '$HF_TOKEN'" in log.read_text()
    assert files_with_canary(tmp_path) == []


def test_a_bug_is_told_in_status_json_without_one(world: Path, tmp_path: Path) -> None:
    def change(module) -> None:
        def bug(*_: object) -> None:
            raise RuntimeError(f"https://me:{CANARY}@host said {os.environ['HF_TOKEN']}")

        module.sft_loss = bug

    run("sft", flags("sft", world, tmp_path / "run"), change=change)
    assert "https://***@host said $HF_TOKEN" in (tmp_path / "run" / "status.json").read_text()
    assert files_with_canary(tmp_path) == []


URL = f"https://me:{CANARY}@host/path"
IN_CONFIGS = {
    "model": ["--model", URL],
    "data": [f"--data={URL}"],
    "held-out data": [f"--data.eval={URL}"],
    "a token for a user": ["--model", f"https://{CANARY}@host/path"],
    "output": [f"--output=s3://key:{CANARY}@bucket"],
    "a number": [f"--optimizer.lr={URL}"],
    "a name of a column": [f"--data.columns.prompt={URL}"],
    "an unknown flag": [f"--a.b={URL}"],
    "a flag's name": [f"--{URL}"],
    "no flag": [URL],
    "machines": ["--num-machines=2", f"--main-address={URL}"],
    "how to launch": [f"--launch={URL}"],
    "a config's name": [f"--config={URL}"],
    "the value of a variable": [f"--model={CANARY}-HF_TOKEN"],
}


@pytest.mark.parametrize("name", IN_CONFIGS)
def test_a_command_line_that_holds_one_is_refused_and_not_repeated(world: Path, tmp_path: Path, name: str) -> None:
    given = IN_CONFIGS[name]
    replaced = {word.split("=")[0] for word in given}
    own = [flag for flag in flags("sft", world, tmp_path / "run") if flag.split("=")[0] not in replaced]
    log = tmp_path / "log"
    assert command(["sft", *own, *given], log) in (2, 78)
    assert log.read_text().startswith("rlhf: error: ")
    assert CANARY not in log.read_text()
    assert not (tmp_path / "run").exists()


def test_all_secrets_of_a_file_are_refused_at_their_places(world: Path, tmp_path: Path) -> None:
    file, log = tmp_path / "sft.yaml", tmp_path / "log"
    file.write_text(
        f"output: {tmp_path}/run\nmodel:\n  path: {URL}\ndata:\n  train: x\n  columns: {{prompt: '{URL}', '{URL}': text}}\n"
        f"lora: {{targets: '{CANARY}-WANDB_API_KEY'}}\n"
    )
    assert command(["sft", "--config", str(file)], log) == 78
    places = [f"{file}:{place}: " for place in ("3:9", "6:21", "6:61", "7:17")]
    said = log.read_text()
    assert all(f"{place}" in said for place in places), said
    assert said.count("holds a secret") == 4
    assert CANARY not in said


@pytest.mark.parametrize("text", ["a@b", "owner/name@main", "https://host/a@b", "count:@", "x: //a@", "https://host?to=a@b"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_a_setting_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")
    monkeypatch.setenv("USE_TOKEN", "true")
    assert str(DataError("false-false true")) == "false-false true"


@pytest.mark.slow
def test_the_command_as_a_user_starts_it(world: Path, tmp_path: Path) -> None:
    arguments = flags("sft", world, tmp_path / "run", schedule__length=1)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "sft", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "OMP_NUM_THREADS=1" in done.stdout
    assert CANARY not in done.stdout + done.stderr
    assert files_with_canary(tmp_path) == []
