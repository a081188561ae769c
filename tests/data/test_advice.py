"""What is said of data that a run would refuse, leave out or read as something else, in words that lead on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.data.rows import read_rows
from rlhf.errors import DataError

PAIR = {"prompt": "q", "chosen": "a good one", "rejected": "a bad one"}
RATED = {"prompt": "q", "completion": "a", "label": True}
RANKED = {"prompt": "q", "responses": ["one", "two", "three"]}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TEXT = {"prompt": "q", "completion": "a"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main(["data", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


# ---- columns ---------------------------------------------------------------------------------------------------------------


def test_columns_that_a_stage_refuses_are_told(tmp_path, capsys):
    file = write(tmp_path / "prompts.jsonl", {"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b", "note": "n"}, {"prompt": "c"})
    with pytest.raises(DataError, match="unknown column 'id'"):
        read_rows(file, "prompt")
    told = said(capsys, "check", file, "--stage", "ppo")
    assert "2 of 3 rows have columns that are no field ('id', 'note')" in told
    assert "--data.extra_columns ignore" in told
    assert "nothing odd" not in told
    plain = write(tmp_path / "plain.jsonl", {"prompt": "a"}, {"prompt": "b"})
    assert "nothing odd" in said(capsys, "check", plain, "--stage", "ppo")


def test_alpacas_columns_are_fields(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"instruction": "do", "input": "this", "output": "done"})
    assert "no field" not in said(capsys, "check", file)


@pytest.mark.parametrize(
    ("kind", "row", "stages"),
    [
        ("sft", PAIR, "rlhf rm or dpo"),
        ("sft", {"prompt": "q"}, "rlhf ppo or grpo"),
        ("pair", RANKED, "rlhf rm"),
        ("pair", RATED, "rlhf kto"),
        ("ranking", TEXT, "rlhf sft"),
        ("ranking", CHAT, "rlhf sft"),
        ("rated", {"prompt": "q", "response": "a"}, "rlhf sft"),
        ("rated", RANKED, "rlhf rm"),
    ],
)
def test_rows_of_another_stage_are_told_as_such(kind, row, stages, tmp_path):
    with pytest.raises(DataError) as told:
        read_rows(write(tmp_path / "rows.jsonl", row), kind)
    assert str(told.value).endswith(f": these are rows for {stages}")
    with pytest.raises(DataError) as told:
        read_rows(tmp_path / "rows.jsonl", kind, extra_columns="ignore")
    assert str(told.value).endswith(f": these are rows for {stages}")


@pytest.mark.parametrize(
    ("kind", "row", "hint"),
    [
        ("sft", {"question": "q", "completion": "a"}, "is it one of them? --data.columns.prompt question"),
        ("ranking", {"question": "q", "chosen": "a", "rejected": "b"}, "is it one of them? --data.columns.prompt question"),
        ("rated", TEXT | {"liked": True}, "is it one of them? --data.columns.label liked"),
        ("ranking", {"prompt": "q", "chosen": "a", "bad": "b"}, "is it one of them? --data.columns.rejected bad"),
        ("sft", TEXT | {"id": 1}, "or leave them (--data.extra_columns ignore)"),  # nothing is missing
        ("sft", RATED, "or leave them (--data.extra_columns ignore)"),
        ("prompt", RATED, "or leave them (--data.extra_columns ignore)"),
    ],
)
def test_the_columns_of_ones_own_stage_are_asked_for(kind, row, hint, tmp_path):
    with pytest.raises(DataError) as told:
        read_rows(write(tmp_path / "rows.jsonl", row), kind)
    assert hint in str(told.value)
    assert "these are rows for" not in str(told.value)


def test_hints_name_the_flags_of_who_gives_them(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"})
    assert "? --columns.prompt question" in said(capsys, "check", file, "--stage", "sft", code=65)
    outputs = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    assert "? --columns.prompt question" in said(capsys, "split", file, *outputs, "--stage", "sft", code=65)
    assert "error: --columns.label: no field of sft data" in said(
        capsys, "check", file, "--stage", "sft", "--columns.label", "answer", code=78
    )
    with pytest.raises(DataError, match=r"\? --data\.columns\.prompt question"):
        read_rows(file, "sft")


def test_a_column_that_no_row_has_is_an_error(tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", PAIR, PAIR | {"margin": 2, "prompt": "other"})
    told = said(capsys, "check", file, "--columns.chosen", "good", code=65)
    assert f"{file}: no row has a column 'good'; there are prompt, chosen, rejected, margin" in told
    assert "2 rows for rm" in said(capsys, "check", file, "--columns.margin", "margin")  # the second row has it


def test_the_files_own_columns_are_named(tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", {"question": "q", "chosen": "a good one", "rejected": "bad"})
    told = said(capsys, "check", file, "--columns.prompt", "question")
    assert "1 rows for rm or dpo, each with question, chosen, rejected\n" in told
    assert "length    chosen: shortest 10," in told
    assert "length    rejected: shortest 3," in told
    told = said(capsys, "check", write(tmp_path / "ranked.jsonl", RANKED))
    assert "each with prompt, responses\n" in told
    assert "length    responses: shortest 11," in told


def test_where_no_row_can_be_read_no_columns_are_named(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"})
    assert "1 rows for sft, none of which can be read\n" in said(capsys, "check", file, "--stage", "sft", code=65)


def test_no_prompt_in_common_is_said(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", TEXT, TEXT | {"completion": "b"}, TEXT | {"prompt": "r"})
    apart = write(tmp_path / "apart.jsonl", {"prompt": "s"})
    assert f"against   none of 2 prompts is in {apart}" in said(capsys, "check", train, "--against", apart)
    shared = write(tmp_path / "shared.jsonl", {"prompt": "r"})
    told = said(capsys, "check", train, "--against", shared)
    assert "none of" not in told
    assert f"1 of 3 rows ask what a row of {shared} asks" in told


# ---- prompts of text, a line each ------------------------------------------------------------------------------------------


def test_prompts_of_text_are_checked_cleaned_and_split(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"question {row}\n" for row in range(40)) + "question 3\n")
    assert "41 rows for ppo or grpo, each with prompt" in said(capsys, "check", file)
    output, sides = tmp_path / "clean.jsonl", [tmp_path / "train.jsonl", tmp_path / "eval.jsonl"]
    assert "40 of 41 rows" in said(capsys, "clean", file, output)
    assert json.loads(output.read_text().splitlines()[0]) == {"prompt": "question 0"}
    said(capsys, "split", file, *sides, "--part", "0.5")
    assert sum(len(side.read_text().splitlines()) for side in sides) == 41


def test_lines_of_text_are_for_prompts_only(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a question\n")
    told = said(capsys, "check", tmp_path / "prompts.txt", "--stage", "sft", code=65)
    assert "a .txt file holds prompts, one a line: it is for ppo, grpo and generate" in told
    (tmp_path / "prompts.csv").write_text("a question\n")
    told = said(capsys, "check", tmp_path / "prompts.csv", "--stage", "sft", code=65)
    assert "unknown kind of file; expected .jsonl, .jsonl.gz, .json or .parquet" in told
    assert "holds prompts" not in told


# ---- with a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    from rlhf.training.tiny import write_tiny_model

    write_tiny_model(tmp_path, seed=0)
    return tmp_path / "model"


def test_pairs_are_shown_as_chosen_and_rejected(model, tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c d"})
    told = said(capsys, "preview", file, "--model", model)
    assert ("pairs.jsonl:1  chosen: " in told, "pairs.jsonl:1  rejected: " in told) == (True, True)
    assert "of the reply\n" in told
    assert ("rank " in told, "trained on" in told) == (False, False)
    assert "of them trained on\n" in said(capsys, "preview", file, "--model", model, "--stage", "dpo")
    told = said(capsys, "preview", write(tmp_path / "ranked.jsonl", RANKED), "--model", model)
    assert ("rank 0: " in told, "rank 2: " in told) == (True, True)
    told = said(capsys, "preview", write(tmp_path / "prompts.jsonl", {"prompt": "a b c"}), "--model", model)
    assert "tokens\n" in told
    assert "trained on" not in told


LONG = [TEXT | {"completion": "b c d " * 10 if row < 4 else "b"} for row in range(9)]
STOPS = "4 of them are longer than 20 tokens, where a run stops"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--max-length", "20"], 65, STOPS),
        (["--max-length", "20", "--too-long", "fail"], 65, STOPS),
        (["--max-length", "20", "--too-long", "skip"], 0, "5 rows are what a run has, of at most 20 tokens"),
        (
            ["--max-length", "20", "--too-long", "skip"],
            0,
            "warning: 4 of 9 rows longer than 20 tokens skipped; --data.max_length",
        ),
        (["--max-length", "20", "--too-long", "truncate"], 0, "9 rows are what a run has, of at most 20 tokens"),
        (["--max-length", "200"], 0, "9 rows are what a run has, of at most 200 tokens"),
        ([], 0, "9 rows are what a run has, of at most 1024 tokens"),
        (["--stage", "ppo"], 0, "9 rows are what a run has, of at most 512 tokens"),
        (["--max-length", "2", "--too-long", "skip"], 65, "no usable row is left"),
        (["--config", "smollm2/sft"], 0, "9 rows are what a run has, of at most 160 tokens"),
        (["--config", "smollm2/sft", "--max-length", "20"], 0, "warning: 4 of 9 rows longer than 20 tokens skipped"),
        (["--config", "text/sft"], 2, "give --json-key text"),
        (["--too-long", "split"], 78, "too_long may be `split` for plain text only"),
    ],
)
def test_a_check_says_which_rows_a_run_has(words, code, told, model, tmp_path, capsys):
    rows = [row | {"prompt": f"q{place}"} for place, row in enumerate(LONG)]
    found = said(capsys, "check", write(tmp_path / "rows.jsonl", *rows), "--model", model, *words, code=code)
    assert told in found
    assert ("nothing odd" in found) == (told.startswith("9 rows") and "20" not in words)


def test_the_run_that_was_foretold(model, tmp_path):
    """The stage's own reader leaves as many rows and stops where it was said to."""
    from rlhf.commands.data import _template
    from rlhf.config.schema import SftData
    from rlhf.data.examples import sft_examples

    path, template = str(write(tmp_path / "rows.jsonl", *LONG)), _template(str(model))
    assert len(sft_examples(path, SftData(train=path, max_length=20, too_long="skip"), template).items) == 5
    with pytest.raises(DataError, match=r"more than data\.max_length 20"):
        sft_examples(path, SftData(train=path, max_length=20), template)
    assert len(sft_examples(path, SftData(train=path, max_length=200), template).items) == 9


def test_lengths_want_a_model(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", TEXT)
    assert "give --model" in said(capsys, "check", file, "--max-length", "20", code=2)
    assert "1 rows for sft" in said(capsys, "check", file)
