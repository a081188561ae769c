"""The command line of a stage: its own flags, the schema's fields, what is handed on, and `--help`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_configs import BAD_WORDS

from rlhf import paths
from rlhf.config.machines import Machines
from rlhf.config.parse import SCHEMAS, Resume, help_text, parse
from rlhf.config.schema import SHORT_FLAGS, STAGES
from rlhf.errors import ConfigError, UsageError

REQUIRED = ["--output", "runs/ppo", "--actor", "sft", "--data", "prompts.jsonl", "--reward", "rm"]


@pytest.fixture(autouse=True)
def one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a wide terminal the boxes of the help stand side by side."""
    monkeypatch.setenv("COLUMNS", "80")


def test_everything_from_flags() -> None:
    invocation = parse("ppo", REQUIRED)
    assert (invocation.stage, invocation.config_file) == ("ppo", None)
    assert (invocation.launch, invocation.nproc) == ("auto", None)
    assert not any((invocation.dry_run, invocation.unit_test, invocation.as_json))
    assert invocation.resume == Resume(None, allow_inexact=False)
    config = invocation.config
    assert (config.output, config.roles.actor, config.data.train) == ("runs/ppo", "sft", "prompts.jsonl")
    assert config.reward.source == "rm"


def test_names_take_dashes_or_underscores_and_values_a_space_or_an_equals_sign() -> None:
    spelled = [
        "--rollout.max-new-tokens",
        "16",
        "--rollout.top_k=5",
        "--max-hours=1e-1",
        "--reward.missing_eos-value=-2",
    ]
    config = parse("ppo", [*REQUIRED, *spelled, "--reward.clip", "3", "--dry_run"]).config
    assert (config.rollout.max_new_tokens, config.rollout.top_k, config.max_hours) == (16, 5, 0.1)
    assert (config.reward.missing_eos_value, config.reward.clip) == (-2.0, 3.0)
    assert parse("ppo", [*REQUIRED, "--reward.missing_eos_value", "-2"]).config.reward.missing_eos_value == -2.0
    assert parse("ppo", [*REQUIRED, "--kl.coef", "0", "--roles.reference=--odd"]).config.roles.reference == "--odd"


def test_a_boolean_alone_is_true() -> None:
    argv = ["--lora.merge", "--gradient-checkpointing", "--ppo.whiten", "false"]
    config = parse("ppo", [*REQUIRED, *argv]).config
    assert (config.lora.merge, config.gradient_checkpointing, config.ppo.whiten) == (True, True, False)
    assert parse("ppo", [*REQUIRED, "--lora.merge"]).config.lora.merge is True
    assert parse("ppo", [*REQUIRED, "--lora.merge=false"]).config.lora.merge is False


def test_our_own_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("output: a\nroles: {actor: b}\ndata: {train: c}\nreward: {source: d}\nseed: 1\n", encoding="utf-8")
    argv = ["--config", str(file), "--launch", "zero2", "--nproc=2", "--dry-run", "--json", "--allow-inexact-resume"]
    invocation = parse("ppo", [*argv, "--seed", "2"])
    assert (invocation.config_file, invocation.launch, invocation.nproc) == (file, "zero2", 2)
    assert invocation.dry_run
    assert invocation.as_json
    assert invocation.resume == Resume(None, allow_inexact=True)
    assert (invocation.config.output, invocation.config.seed) == ("a", 2)


def test_the_stage_script_gets_all_but_the_launch_flags_and_parses_them_alike(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("roles: {actor: b}\n", encoding="utf-8")
    rest = [
        "--config",
        str(file),
        "--output=x",
        "--data",
        "c",
        "--reward",
        "d",
        "--lora.merge",
        "--json",
        "--ppo.clip=1",
    ]
    for_launch = ["--launch", "cpu", "--nproc", "2", "--num-machines=2", "--machine-rank=1", "--main-address=a:1", "--dry-run"]
    outer = parse("ppo", [*rest[:3], *for_launch, *rest[3:]])
    assert outer.arguments == rest
    assert outer.machines == Machines(2, 1, "a", 1)
    inner = parse("ppo", outer.arguments)
    assert inner.config == outer.config
    assert inner.arguments == outer.arguments


def test_the_unit_test_has_a_config_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CONFIGS", tmp_path)
    (tmp_path / "unit-test.yaml").write_text(
        "output: unit\nroles: {actor: tiny}\ndata: {train: p}\nreward: {source: 'count:a'}\n", encoding="utf-8"
    )
    invocation = parse("ppo", ["--unit-test", "--actor", "mine"])
    assert invocation.unit_test
    assert invocation.config_file == tmp_path / "unit-test.yaml"
    assert (invocation.config.output, invocation.config.roles.actor) == ("unit", "mine")
    assert invocation.arguments == ["--unit-test", "--actor", "mine"]
    other = tmp_path / "other.yaml"
    other.write_text("output: o\nroles: {actor: b}\ndata: {train: c}\nreward: {source: d}\n", encoding="utf-8")
    assert parse("ppo", ["--unit-test", "--config", str(other)]).config_file == other


@pytest.mark.parametrize("more", [["--nproc=2"], ["--launch=ddp"], ["--num-machines=2", "--main-address=a"]])
def test_the_unit_test_is_one_process(more: list[str]) -> None:
    with pytest.raises(UsageError, match="--unit-test: runs in one process"):
        parse("ppo", ["--unit-test", *more])


@pytest.mark.parametrize(("argv", "message"), BAD_WORDS)
def test_what_is_no_command_line_is_a_usage_mistake(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse("ppo", argv)
    assert str(error.value).startswith(message)
    assert error.value.exit_code == 2


def test_mistakes_in_flags_are_collected_with_those_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("output: a\nroles: {actor: b}\ndata: {train: c}\nseed: x\n", encoding="utf-8")
    argv = ["--config", str(file), "--dryrun", "--ppo.clpi", "1", "--actor", "c", "--roles.actor=d", "--lora.rank=1.5"]
    with pytest.raises(ConfigError) as error:
        parse("ppo", argv)
    lines = str(error.value).replace(f"{tmp_path}/", "").split("\n")
    assert [line.partition(": ")[0] for line in lines] == [
        "mine.yaml:1:1",
        "mine.yaml:4:7",
        "--dryrun",
        "--ppo.clpi",
        "--roles.actor",
        "--lora.rank",
    ]
    assert "did you mean `--dry-run`?" in lines[2]
    assert "given twice, first as --actor" in lines[4]


def test_a_command_takes_its_model_first(tmp_path: Path) -> None:
    config = parse("eval", ["runs/sft", "--data", "rows.jsonl", "--precision=both", "--fp8.keep-first", "1"]).config
    assert (config.model, config.data.file, config.fp8.recipe, config.fp8.keep_first) == ("runs/sft", "rows.jsonl", "block", 1)
    assert parse("eval", ["--data=rows.jsonl", "--model=runs/sft", "--precision=both", "--fp8.keep-first=1"]).config == config
    (tmp_path / "mine.yaml").write_text(
        "model: runs/sft\ndata: {file: rows.jsonl}\nprecision: both\nfp8: {keep_first: 1}\n", encoding="utf-8"
    )
    assert parse("eval", ["--config", str(tmp_path / "mine.yaml")]).config == config
    with pytest.raises(ConfigError, match="fp8 is set and precision is fp32: give precision `fp8` or `both`"):
        parse("eval", ["runs/sft", "--data", "rows.jsonl", "--fp8.recipe", "block"])
    with pytest.raises(UsageError, match="`runs/sft`: expected a flag"):
        parse("sft", ["runs/sft", "--data", "rows.jsonl"])


def test_unit_test_is_for_ppo_alone() -> None:
    with pytest.raises(ConfigError, match="--unit-test: unknown flag"):
        parse("sft", ["--output", "o", "--model", "m", "--data", "d", "--unit-test"])


def leaves(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and descriptions, out of pydantic's own JSON schema."""
    for name, field in node["properties"].items():
        if "$ref" in field:
            yield from leaves(schema, schema["$defs"][field["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
        else:
            yield prefix + name, field["description"]


def without_layout(text: str) -> str:
    return re.sub(r"[\s│]+", "", text)


@pytest.mark.parametrize("stage", SCHEMAS)
def test_help_shows_every_field_with_its_description(stage: str) -> None:
    letters = without_layout(help_text(stage))
    schema = SCHEMAS[stage].model_json_schema()
    fields = dict(leaves(schema, schema))
    assert len(fields) >= 20
    for name, description in fields.items():
        flag = "--" + name.replace("_", "-")
        assert re.search(re.escape(flag) + "(?:(?!--).)*?" + re.escape(without_layout(description)), letters), name
    for short in SHORT_FLAGS.values():
        given = any(f"--{short}{metavar}" in letters for metavar in ("TEXT", "true|false"))
        assert given == any(short in (name, SHORT_FLAGS.get(name)) for name in fields), short
    assert "--configNAME|FILE" in letters
    assert "--json" in letters
    for own in ("--launchNAME|FILE", "--nprocINTEGER", "--dry-run", "--allow-inexact-resume"):
        assert (own in letters) == (stage in STAGES), own
    assert ("--unit-test" in letters) == (stage == "ppo")


def test_help_shows_range_and_default() -> None:
    letters = without_layout(help_text("ppo"))
    for shown in (
        "--ppo.clip NUMBER Policy ratio clipping range: a ratio counts between 1 - clip and 1 + clip. (above 0; default: 0.2)",
        "--ppo.gamma NUMBER Discount per token. (from 0 to 1; default: 1.0)",
        "--precision fp64|fp32|bf16",
        "--max-hours NUMBER|none",
        "--data.columns.NAME TEXT",
        "The run's directory. (required)",
    ):
        assert without_layout(shown) in letters


def test_help_is_printed_and_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("rm", ["--nonsense", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: rlhf rm")


@pytest.mark.parametrize(("argv", "tyro"), [(REQUIRED, False), (["--help"], True)])
def test_a_command_line_is_read_without_torch(argv: list[str], tyro: bool) -> None:
    program = (
        "import contextlib, sys\n"
        "from rlhf.config.parse import parse\n"
        "with contextlib.suppress(SystemExit):\n"
        f"    parse('ppo', {argv!r})\n"
        "print('\\nloaded', *sorted({'torch', 'transformers', 'datasets', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1].split() == (["loaded", "tyro"] if tyro else ["loaded"])


@pytest.mark.parametrize(
    ("command", "usage", "flags"),
    [
        ("generate", "usage: rlhf generate MODEL [-h] [OPTIONS]", "`MODEL` may also be given as `--model MODEL`."),
        ("eval", "usage: rlhf eval MODEL [-h] [OPTIONS]", "`MODEL` may also be given as `--model MODEL`."),
        ("chat", "usage: rlhf chat MODEL [-h] [OPTIONS]", "`MODEL` may also be given as `--model MODEL`."),
        ("score", "usage: rlhf score REWARD DATA [-h]", "may also be given as `--reward REWARD --data DATA`."),
        ("sft", "usage: rlhf sft [-h] [OPTIONS]", ""),
    ],
)
def test_what_is_given_by_its_place_is_in_the_usage(command: str, usage: str, flags: str) -> None:
    text = " ".join(help_text(command).split())
    assert text.startswith(usage)
    assert flags in text
    assert ("may also be given as" in text) is bool(flags)
