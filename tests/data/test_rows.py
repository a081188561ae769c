"""Rows of every kind and spelling against hand-written results, the notes, skipping, and real public sets."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.rows import read_rows
from rlhf.errors import ConfigError, DataError

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
HH_MESSAGES = [user("Hi"), assistant("Hello!"), user("Why?")]
HH_NOTE = "hh-rlhf transcripts were read as messages in 1 row."
SHAREGPT_NOTE = "ShareGPT turns were read as messages in 1 row."
SPLIT_NOTE = "The prompt was split off where chosen and rejected part in 1 row."

# kind, row as written, row as read, notes (None: not looked at)
READ: list[tuple[Any, dict[str, Any], dict[str, Any], list[str] | None]] = [
    ("text", {"text": "a b"}, {"text": "a b"}, []),
    ("sft", {"text": "a b"}, {"text": "a b"}, []),
    ("sft", {"prompt": "p", "completion": " c"}, {"prompt": "p", "completion": " c"}, []),
    (
        "sft",
        {"prompt": "p", "response": "c"},
        {"prompt": "p", "completion": "c"},
        ["Column 'response' was read as 'completion' in 1 row."],
    ),
    ("sft", {"messages": [user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}, []),
    (
        "sft",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [user("q"), assistant("a")]},
        [SHAREGPT_NOTE, "Column 'conversations' was read as 'messages' in 1 row."],
    ),
    (
        "sft",
        {"prompt": [user("q")], "completion": " a"},
        {"prompt": [user("q")], "completion": [assistant(" a")]},
        [],
    ),
    (
        "sft",
        {"prompt": HH_PROMPT, "completion": " Because."},
        {"prompt": HH_MESSAGES, "completion": [assistant("Because.")]},
        [HH_NOTE],
    ),
    (
        "pair",
        {"prompt": "p", "choosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        ["Column 'choosen' was read as 'chosen' in 1 row."],
    ),
    (
        "pair",
        {"prompt": HH_PROMPT, "chosen": " Because.", "rejected": " No."},
        {"prompt": HH_MESSAGES, "chosen": [assistant("Because.")], "rejected": [assistant("No.")]},
        [HH_NOTE],
    ),
    (
        "pair",
        {"chosen": HH_PROMPT + " Because.", "rejected": HH_PROMPT + " No."},
        {"prompt": HH_MESSAGES, "chosen": [assistant("Because.")], "rejected": [assistant("No.")]},
        [SPLIT_NOTE, HH_NOTE],
    ),
    (
        "pair",
        {"chosen": [user("q"), assistant("a"), user("b"), assistant("c")], "rejected": [user("q"), assistant("r")]},
        {"prompt": [user("q")], "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": [assistant("r")]},
        [SPLIT_NOTE],
    ),
    (
        "pair",  # as HuggingFaceH4/ultrafeedback_binarized has it: the prompt alone and again in both conversations
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        [SPLIT_NOTE],
    ),
    (
        "pair",
        {
            "prompt": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {
            "prompt": [{"role": "system", "content": "s"}, user("q")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        },
        [SHAREGPT_NOTE],
    ),
    ("rated", {"prompt": "p", "response": "c", "label": False}, {"prompt": "p", "completion": "c", "label": False}, None),
    ("rated", {"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": "c", "rejected": "r"}, []),
    ("prompt", {"prompt": "p"}, {"prompt": "p"}, []),
    ("prompt", {"prompt": "p", "choosen": "c", "rejected": None}, {"prompt": "p"}, None),
    ("prompt", {"prompt": HH_PROMPT}, {"prompt": HH_MESSAGES}, [HH_NOTE]),
    ("prompt", {"messages": [user("q"), assistant("a")]}, {"prompt": [user("q")]}, []),
    (
        "prompt",
        {"messages": [user("q"), assistant("a"), user("b")]},
        {"prompt": [user("q"), assistant("a"), user("b")]},
        [],
    ),
    ("prompt", {"chosen": HH_PROMPT + " Because.", "rejected": HH_PROMPT}, {"prompt": HH_MESSAGES}, [HH_NOTE]),
]


@pytest.mark.parametrize(("kind", "written", "expected", "notes"), READ)
def test_row_is_normalised(
    tmp_path: Path, kind: Any, written: dict[str, Any], expected: dict[str, Any], notes: list[str] | None
) -> None:
    path = write(tmp_path / "rows.jsonl", written)
    rows = read_rows(path, kind)
    assert [row.fields for row in rows.rows] == [expected]
    assert rows.rows[0].where == f"{path}:1"
    if notes is not None:
        assert sorted(rows.notes) == sorted(notes)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("pair", {"chosen": "a", "rejected": "b"}, "prompt is missing"),
    ("pair", {"prompt": "p", "chosen": "a"}, "rejected is missing"),
    ("pair", {"prompt": "p", "chosen": "a", "rejected": ""}, "rejected is empty"),
    ("pair", {"prompt": HH_PROMPT, "chosen": "a", "rejected": " "}, "rejected is empty"),
    (
        "pair",
        {"prompt": "p", "chosen": [assistant("a")], "rejected": "b"},
        "chosen is messages, but the prompt is a string",
    ),
    ("pair", {"prompt": [user("p")], "chosen": [user("a")], "rejected": "b"}, "chosen is not a reply"),
    ("sft", {"prompt": [user("p")], "completion": [user("p"), assistant("a")]}, "completion is not a reply"),
    ("pair", {"prompt": [user("p"), assistant("x")], "chosen": "a", "rejected": "b"}, "prompt ends with an assistant"),
    (
        "pair",
        {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("a")]},
        "the common beginning of",
    ),
    ("pair", {"chosen": HH_PROMPT + " a", "rejected": HH_PROMPT}, "rejected is an empty reply"),
    (
        "pair",
        {"prompt": "other", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        "prompt is not what chosen and rejected have in common",
    ),
    ("rated", {"prompt": "p", "completion": "c"}, "label is missing"),
    ("rated", {"prompt": "p", "completion": "c", "label": 1}, "label is a number, expected true or false"),
    ("rated", {"prompt": "p", "chosen": "c", "rejected": "r", "label": True}, "prompt, label, chosen, rejected are all given"),
    ("sft", {"prompt": "p"}, "completion is missing"),
    ("sft", {"prompt": "", "completion": "c"}, "prompt is empty"),
    ("sft", {"messages": "q"}, "messages is a string, expected a list of messages"),
    ("prompt", {"completion": "c"}, "prompt is missing; the row has completion"),
    ("prompt", {"messages": [assistant("a")]}, "messages is empty"),
]


@pytest.mark.parametrize(("kind", "written", "reason"), REFUSED)
def test_row_of_the_wrong_shape_is_refused(tmp_path: Path, kind: Any, written: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "rows.jsonl", written)
    with pytest.raises(DataError) as caught:
        read_rows(path, kind)
    assert str(caught.value).startswith(f"{path}:1: {reason}")


def test_columns_are_mapped_and_errors_speak_of_the_files_names(tmp_path: Path) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"})
    assert read_rows(path, "sft", columns=columns).rows[0].fields == {"prompt": "q", "completion": "a"}
    with pytest.raises(
        DataError, match=r":1: unknown columns 'question', 'answer', and prompt is missing; .* --data.columns.prompt question"
    ):
        read_rows(path, "sft")
    write(path, {"question": "q", "answer": 3}, {"answer": "a"})
    with pytest.raises(DataError) as caught:
        read_rows(path, "sft", columns=columns)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:1: answer is a number")
    assert second.startswith(f"{path}:2: question is missing; the row has answer")


def test_a_mapped_column_may_have_the_name_of_another_field(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "q", "prompt": "a"})
    rows = read_rows(path, "sft", columns={"prompt": "text", "completion": "prompt"})
    assert rows.rows[0].fields == {"prompt": "q", "completion": "a"}
    write(path, {"prompt": "p", "chosen": "bad", "rejected": "good"})
    rows = read_rows(path, "pair", columns={"chosen": "rejected", "rejected": "chosen"})
    assert rows.rows[0].fields == {"prompt": "p", "chosen": "good", "rejected": "bad"}


def test_columns_and_json_key_that_do_not_fit_the_kind_are_a_config_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "q"})
    with pytest.raises(ConfigError, match=r"data.columns.promt: .*did you mean 'prompt'"):
        read_rows(path, "pair", columns={"promt": "question"})
    with pytest.raises(ConfigError, match=r"data.columns: two fields are read from one column"):
        read_rows(path, "pair", columns={"chosen": "answer", "rejected": "answer"})
    with pytest.raises(ConfigError, match=r"data.json_key"):
        read_rows(path, "pair", json_key="body")


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_json_key_names_the_column_of_plain_text(tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path / "rows.jsonl", {"body": "a b", "text": "title"})
    rows = read_rows(path, kind, json_key="body", extra_columns="ignore")
    assert rows.rows[0].fields == {"text": "a b"}
    assert rows.notes == ["Column 'text' was not read in 1 row."]


def test_equal_pairs_are_dropped_and_repeated_prompts_counted(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    conversation = [user("q"), assistant("a")]
    path = write(
        tmp_path / "rows.jsonl",
        *[pair] * 3,
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"chosen": conversation, "rejected": conversation},
        {"prompt": HH_PROMPT, "chosen": " Yes.", "rejected": "Yes."},
    )
    rows = read_rows(path, "pair")
    assert len(rows.rows) == 3
    assert "The pair was dropped because chosen equals rejected in 3 rows." in rows.notes
    assert "A prompt seen before is repeated in 2 rows." in rows.notes
    write(path, {"prompt": "p", "chosen": "a", "rejected": "a"})
    with pytest.raises(DataError, match="no usable row"):
        read_rows(path, "pair")


def test_skip_drops_bad_rows_up_to_the_allowed_part(tmp_path: Path) -> None:
    good = [{"text": f"row {n}"} for n in range(98)]
    path = write(tmp_path / "rows.jsonl", {"text": None}, *good, {"text": ""})
    rows = read_rows(path, "text", on_error="skip", max_skip_fraction=0.02)
    assert [row.where for row in rows.rows] == [f"{path}:{line}" for line in range(2, 100)]
    assert rows.notes == ["Bad rows were skipped: text is null, expected a string in 1 row; text is empty in 1 row."]
    with pytest.raises(DataError) as caught:
        read_rows(path, "text", on_error="skip", max_skip_fraction=0.019)
    assert str(caught.value).splitlines()[0].startswith(f"{path}:1: text is null")
    assert str(caught.value).splitlines()[2] == f"{path}: 2 of 100 rows are bad; data.max_skip_fraction is 0.019"


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    table = [{"messages": [user(f"q{n}"), assistant("é")]} for n in range(3)]
    plain = write(tmp_path / "rows.jsonl", *table)
    packed, array, parquet = tmp_path / "rows.jsonl.gz", tmp_path / "rows.json", tmp_path / "rows.parquet"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    array.write_text(json.dumps(table, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), parquet)
    places = {plain: ":1 :2 :3", packed: ":1 :2 :3", array: "[0] [1] [2]", parquet: "#0 #1 #2"}
    for path, expected in places.items():
        rows = read_rows(path, "sft")
        assert [row.fields for row in rows.rows] == table
        assert [row.where for row in rows.rows] == [f"{path}{place}" for place in expected.split()]


def test_prompts_may_be_lines_of_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b'\xef\xbb\xbfWhat is it?\r\n\n  {"a": 1} \nthe last')
    found = read_rows(file, "prompt")
    assert [row.fields["prompt"] for row in found.rows] == ["What is it?", '  {"a": 1} ', "the last"]
    assert [row.where for row in found.rows] == [f"{file}:1", f"{file}:3", f"{file}:4"]
    assert found.notes == ["The file starts with a byte-order mark, which was skipped.", "1 blank line was skipped."]
    with pytest.raises(
        DataError, match=r"prompts\.txt: unknown kind of file; expected \.jsonl, \.jsonl\.gz, \.json or \.parquet"
    ):
        read_rows(file, "pair")
    file.write_bytes(b"fine\nna\xefve\n" + b"long" * 9)
    with pytest.raises(DataError, match=r"txt:2:3: invalid UTF-8 byte 0xef.*\n.*txt:3: the line is longer than 20 bytes"):
        read_rows(file, "prompt", max_line_bytes=20)


def test_parquet_rows_are_held_to_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    with pytest.raises(DataError) as caught:
        read_rows(path, "text")
    assert str(caught.value) == f"{path}#1: text is null, expected a string"


def test_reading_needs_neither_torch_nor_transformers() -> None:
    heavy = "torch transformers datasets trl pyarrow"
    code = f"import sys, rlhf.data.rows; print([name for name in '{heavy}'.split() if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# file, kind, arguments, usable rows: as many as the README beside the sets counts, less what the comment says
REAL_SETS: list[tuple[str, Any, dict[str, Any], int]] = [
    ("pref_hh_helpful-base", "pair", {"on_error": "skip"}, 2348),  # 4 rejected replies are " "
    ("pref_hh_helpful-base", "prompt", {}, 2352),
    ("hh_helpful-base.test", "pair", {"on_error": "skip"}, 2348),  # the same 4, and 2 pairs are equal
    ("hh_helpful-base.test", "prompt", {}, 2354),
    ("pref_llamafactory_dpo_en_demo", "pair", {"columns": {"prompt": "conversations"}}, 300),
    ("sft_oasst_en100_trees", "sft", {}, 254),
    ("sft_gsm8k_train", "sft", {"columns": {"prompt": "question", "completion": "answer"}}, 7473),
    ("sent_sst2_train", "text", {"extra_columns": "ignore"}, 6920),
    ("prompts_user_oriented_252", "prompt", {"columns": {"prompt": "instruction"}, "extra_columns": "ignore"}, 252),
]
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs the public sets in ../shared/data")


@needs_real_data
@pytest.mark.parametrize(("name", "kind", "arguments", "usable"), REAL_SETS)
def test_real_set_loads(name: str, kind: Any, arguments: dict[str, Any], usable: int) -> None:
    assert len(read_rows(REAL / f"{name}.jsonl.gz", kind, **arguments).rows) == usable


@needs_real_data
def test_the_two_spellings_of_hh_rlhf_give_the_same_pairs() -> None:
    """One file is the raw transcripts, the other was split into prompt and replies by somebody else."""
    raw = read_rows(REAL / "hh_helpful-base.test.jsonl.gz", "pair", on_error="skip")
    split = read_rows(REAL / "pref_hh_helpful-base.jsonl.gz", "pair", on_error="skip")
    differing = [a.where for a, b in zip(raw.rows, split.rows, strict=True) if a.fields != b.fields]
    assert differing == []


def test_rows_ask_the_same_however_they_are_written(tmp_path: Path) -> None:
    chat = [user("q"), assistant("a")]
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "q", "completion": "a"},
        {"prompt": [user("q")], "completion": [assistant("b")]},
        {"messages": chat},
        {"messages": [*chat, user("more"), assistant("c")]},
        {"messages": [*chat, user("more"), assistant("d"), user("and")]},
        {"text": "q"},
        {"text": "q"},
    )
    one, *others = [row.asks for row in read_rows(path, "sft").rows]
    assert [asks == one for asks in others] == [True, True, False, False, False, False]
    assert others[2] == others[3]
    assert others[4] == others[5]
    assert "A prompt seen before is repeated in 4 rows." in read_rows(path, "sft").notes


def test_columns_that_somebody_asks_for(tmp_path: Path) -> None:
    """They are no unknown columns, and every row has them; a field of the row may be asked for, too."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "gold": 7, "completion": "c"}\n{"prompt": "p", "gold": null}\n{"prompt": "p"}\n')
    asked = {"gold": "verify:exact", "completion": "mine.py:f"}
    with pytest.raises(DataError) as refused:
        read_rows(path, "prompt", asked={"gold": "verify:exact"})
    lines = str(refused.value).split("\n")
    assert [line.partition(": ")[0] for line in lines] == [f"{path}:2", f"{path}:3"]
    assert "gold is null, which verify:exact asks for" in lines[0]
    assert "gold is missing, which verify:exact asks for; the row has prompt" in lines[1]
    path.write_text('{"prompt": "p", "gold": 7, "completion": "c"}\n')
    assert read_rows(path, "prompt", asked=asked).rows[0].others == {"gold": 7, "completion": "c"}
    with pytest.raises(DataError, match="unknown column 'gold'"):
        read_rows(path, "prompt", asked={"completion": "mine.py:f"})
