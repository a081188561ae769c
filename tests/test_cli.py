"""The words `rlhf` understands, the exit codes it ends with, and that it starts fast."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf import cli, errors, paths
from rlhf.cli import main


def test_help_is_one_screen_of_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr().out == text
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 120
    words = set(re.findall(r"[\w-]+", text))
    assert {*cli.STAGES, *cli.COMMANDS} <= words
    columns = [part for line in lines[2:-4] for part in (line[2:21], line[60:])]
    named = {word for part in columns if " " in part for word in re.findall(r"^[a-z0-9-]+(?:, [a-z]+)*", part)[:1]}
    assert {"data", "report", "explain", "compare"} <= named  # both columns are seen, and each names what is there:
    assert {word for words in named for word in words.split(", ")} - {"rlhf"} <= {*cli.STAGES, *cli.COMMANDS}


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_every_command_has_help_of_its_own(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):  # how argparse ends
        assert main([word, "--help"]) == 0
    assert f"rlhf {word}" in capsys.readouterr().out


@pytest.mark.parametrize("example", re.findall(r"  rlhf ((?:sft|rm|dpo|kto|ppo|grpo) --config .*)", cli.HELP))
def test_the_examples_in_the_help_parse(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what they name: a dry run asks for that."""
    monkeypatch.chdir(tmp_path)
    for model in ("DIR", "SFT", "RM", "runs/sft"):
        Path(model).mkdir(parents=True)
        Path(model, "config.json").write_text("{}")
    for data in ("chats.jsonl", "pairs.jsonl", "FILE"):
        Path(data).touch()
    assert main([*example.split(), "--dry-run"]) == 0
    assert "would write:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf {version('rlhf')}\n"


@pytest.mark.parametrize("words", [["pppo"], ["--seed", "1"], ["show"], ["path", "nothing"], ["show", "a", "b"]])
def test_a_wrong_word_is_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlhf: error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("said so"), 2),
        (errors.DataError("said so"), 65),
        (errors.OutputError("said so"), 73),
        (errors.Locked("said so"), 75),
        (errors.ConfigError("said so"), 78),
    ],
)
def test_mistakes_have_their_exit_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_dispatch", raiser(error))
    assert main(["sft"]) == code
    assert capsys.readouterr().err == "rlhf: error: said so\n"


def test_a_bug_of_ours_is_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_dispatch", raiser(KeyError("oops")))
    assert main(["sft"]) == 70
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "oops" in error


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_dispatch", raiser(KeyboardInterrupt()))
    assert main(["sft"]) == 130


def raiser(error: BaseException):
    def fail(argv: list[str]) -> int:
        raise error

    return fail


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "ppo"])
def test_path_and_copy(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["path", stage]) == 0
    recipe = Path(capsys.readouterr().out.strip())
    assert recipe == paths.STAGES / f"{stage}.py"
    for arguments, target in [([], f"{stage}.py"), (["mine.py"], "mine.py"), (["."], f"./{stage}.py")]:
        Path(target).unlink(missing_ok=True)
        assert main(["copy", stage, *arguments]) == 0
        assert Path(target).read_bytes() == recipe.read_bytes()


def test_copy_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft.py").write_text("mine")
    assert main(["copy", "sft"]) == 73
    assert main(["copy", "sft", "no/such/place.py"]) == 73
    assert "there is no directory no/such" in capsys.readouterr().err
    assert Path("sft.py").read_text() == "mine"


def test_help_and_dry_run_in_a_fresh_process_import_no_torch(tmp_path: Path) -> None:
    """And so are quick; the goal of 1.5 s is for an idle machine and not asserted."""
    (tmp_path / "sft.yaml").write_text("output: run\nmodel: {path: owner/base}\ndata: {train: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").touch()
    code = (
        "import sys; from rlhf.cli import main\n"
        "codes = [main(['--help']), main(['sft', '--config', 'sft.yaml', '--dry-run'])]\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'tyro', 'rich'} & set(sys.modules)\n"
        "print(codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0] set()"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "sft.yaml"]
