"""Malformed data files: each is refused or accepted as designed, at the exact place. The first table holds the 15 cases
that a common JSON loader takes without a word, or refuses without saying where."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from rlhf.data.rows import read_rows
from rlhf.errors import DataError

GOOD = b'{"prompt": "Hi", "completion": "Hello"}\n'

# name, what follows two good lines, what the error says from the path on
REFUSED = [
    ("number as prompt", b'{"prompt": 7, "completion": "x"}\n', ":3: prompt is a number, expected a string or a list"),
    ("missing key", b'{"prompt": "Hi"}\n', ":3: completion is missing; the row has prompt"),
    (
        "extra key",
        b'{"prompt": "Hi", "completion": "x", "id": 1}\n',
        ":3: unknown column 'id'; expected messages, prompt,",
    ),
    ("NaN", b'{"prompt": "Hi", "completion": NaN}\n', ":3: NaN is not a JSON value"),
    ("null", b'{"prompt": "Hi", "completion": null}\n', ":3: completion is null, expected a string or a list"),
    ("bad JSON", b'{"prompt": "Hi" "completion": "x"}\n', ":3:17: not JSON: Expecting ',' delimiter"),
    ("duplicate key", b'{"prompt": "Hi", "completion": "x", "prompt": "Hi"}\n', ":3: duplicate key 'prompt'"),
    ("lone surrogate", b'{"prompt": "\\ud83d", "completion": "x"}\n', r":3: prompt holds the lone surrogate '\ud83d'"),
    ("truncated last line", b'{"prompt": "Hi", "comple', ":3: truncated last line, it ends after 24 bytes"),
    ("invalid UTF-8", b'{"prompt": "\xc3\xa9\xff", "completion": "x"}\n', ":3:14: invalid UTF-8 byte 0xff"),
    ("long line", b'{"prompt": "Hi", "completion": "' + b"x" * 500 + b'"}\n', ":3: the line is longer than 400 bytes"),
    ("top-level array", b'[{"prompt": "Hi", "completion": "x"}]\n', ":3: expected an object, found a list"),
    # beyond the 15
    ("Infinity", b'{"prompt": "Hi", "completion": -Infinity}\n', ":3: -Infinity is not a JSON value"),
    ("nested duplicate", b'{"prompt": [{"role": "user", "role": "user"}]}\n', ":3: duplicate key 'role'"),
    ("misspelt key", b'{"promt": "Hi", "completion": "x"}\n', ":3: unknown column 'promt' (did you mean 'prompt'?)"),
    ("a bare string", b'"Hi"\n', ":3: expected an object, found a string"),
    ("empty completion", b'{"prompt": "Hi", "completion": " "}\n', ":3: completion is empty"),
    ("huge number", b'{"prompt": ' + b"9" * 350 * 13 + b"}\n", ":3: the line is longer than 400 bytes"),
    (
        "bare control character",
        b'{"prompt": "a\tb", "completion": "x"}\n',
        ":3:14: not JSON: Invalid control character",
    ),
    ("no key", b'{"prompt": [{"content": "Hi"}], "completion": "x"}\n', ":3: prompt[0] has no 'role'"),
    (
        "role",
        b'{"messages": [{"role": "bot", "content": "Hi"}]}\n',
        ":3: messages[0].role is 'bot'; expected one of system,",
    ),
    (
        "content",
        b'{"messages": [{"role": "user", "content": 1}]}\n',
        ":3: messages[0].content is a number, expected a string",
    ),
    (
        "tools",
        b'{"messages": [{"role": "user", "content": "", "name": 1}]}\n',
        ":3: messages[0] has the unknown key 'name'",
    ),
    ("no message", b'{"messages": []}\n', ":3: messages is an empty list"),
    ("no reply", b'{"messages": [{"role": "user", "content": "Hi"}]}\n', ":3: messages has no assistant message"),
    (
        "empty reply",
        b'{"messages": [{"role": "assistant", "content": ""}]}\n',
        ":3: messages[0].content is an empty assistant",
    ),
    ("two forms", b'{"text": "Hi", "completion": "x"}\n', ":3: completion, text are all given"),
    (
        "alias twice",
        b'{"prompt": "Hi", "completion": "x", "response": "x"}\n',
        ":3: response and completion both give the",
    ),
]


@pytest.mark.parametrize(("bad", "expected"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
@pytest.mark.parametrize("extension", [".jsonl", ".jsonl.gz"])
def test_bad_line_is_refused_at_its_place(tmp_path: Path, bad: bytes, expected: str, extension: str) -> None:
    path = tmp_path / f"rows{extension}"
    data = GOOD * 2 + bad + (GOOD if bad.endswith(b"\n") else b"")
    path.write_bytes(gzip.compress(data) if extension.endswith("gz") else data)
    with pytest.raises(DataError) as caught:
        read_rows(path, "sft", max_line_bytes=400)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{path}{expected}")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    for name, data in [
        ("a.jsonl", b""),
        ("b.jsonl", b"\n \n"),
        ("c.json", b""),
        ("d.json", b"[]"),
        ("e.jsonl.gz", b""),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: the file is empty"):
            read_rows(tmp_path / name, "sft")


def test_byte_order_mark_is_accepted_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    rows = read_rows(path, "sft")
    assert rows.rows[0].fields == {"prompt": "Hi", "completion": "Hello"}
    assert rows.notes == ["The file starts with a byte-order mark, which was skipped."]


def test_blank_lines_are_skipped_counted_and_keep_the_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + GOOD + b" \r\n" + GOOD.replace(b"Hi", b"Ho").rstrip())
    rows = read_rows(path, "sft")
    assert [row.where for row in rows.rows] == [f"{path}:2", f"{path}:4"]
    assert rows.notes == ["2 blank lines were skipped."]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [(b'{"prompt": ' + b"9" * 5000 + b"}\n", "Exceeds the limit"), (b"[" * 200_000 + b"\n", "recursion")],
    ids=["number of 5000 digits", "200000 open brackets"],
)
def test_what_the_parser_itself_gives_up_on_has_a_place(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + bad)
    with pytest.raises(DataError, match=reason) as caught:
        read_rows(path, "sft")
    assert str(caught.value).startswith(f"{path}:2: not JSON that can be read")


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_at_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path, ending: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    line = GOOD.rstrip()
    path.write_bytes(line + ending)
    assert len(read_rows(path, "sft", max_line_bytes=len(line)).rows) == 1
    with pytest.raises(DataError, match=":1: the line is longer"):
        read_rows(path, "sft", max_line_bytes=len(line) - 1)


def test_every_mistake_of_a_file_is_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    others = [f'{{"prompt": "Hi", "completion": "x", "column{n}": 1}}\n'.encode() for n in range(24)]
    path.write_bytes(b"{\n" + GOOD + b'{"prompt": "Hi"}\n' * 4 + b"".join(others))
    with pytest.raises(DataError) as caught:
        read_rows(path, "sft")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert [line.split(" ")[0] for line in lines[:20]] == [f"{path}:1:2:", *(f"{path}:{n}:" for n in range(3, 22))]
    assert lines[20].startswith("and 9 more: unknown column 'column15' in 1 row; ")


def test_the_same_mistake_many_times_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n" + GOOD + b'{"prompt": "Hi"}\n' * 23 + b'{"prompt": 1, "completion": "x"}\n')
    with pytest.raises(DataError) as caught:
        read_rows(path, "sft")
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [f"{path}:1:2:", f"{path}:3:", "and", f"{path}:26:"]
    assert lines[2] == f"and in 22 rows more the same: {', '.join(f'{path}:{n}' for n in range(4, 8))}, ..."


def test_cut_gzip_is_refused_even_when_skipping(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 1000)[:-10])
    with pytest.raises(DataError, match="broken gzip data"):
        read_rows(path, "sft", on_error="skip", max_skip_fraction=1.0)
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match=r":1: broken gzip data .*fetch it again"):
        read_rows(path, "sft")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"text": "a"}, {"text": 1}]', "[1]: text is a number, expected a string"),
        ('[{"text": "a"}, {"text": NaN}, {"text": "b"}]', "[1]: NaN is not a JSON value"),
        ('[{"text": "a", "text": "a"}]', "[0]: duplicate key 'text'"),
        ('[{"text": "a"}, 3]', "[1]: expected an object, found a number"),
        ('[{"text": "a"},\n {"text" "b"}]', ":2:10: not JSON: Expecting ':' delimiter"),
        ('[{"text": "a"},\n]', ":2:1: not JSON: Expecting value"),
        ('[{"text": "a"}', ":1:15: not JSON: Expecting ','"),
        ('[{"text": "a"}] 1', ":1:17: not JSON: Extra data"),
        ('{"text": "a"}\n{"text": "b"}', ":1:1: not JSON: Expecting '['; a .json file holds one array of objects"),
    ],
)
def test_json_array_is_refused_at_its_index_or_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(path, "text")
    assert str(caught.value).splitlines()[0].startswith(f"{path}{expected}")


def test_json_array_with_invalid_utf8_is_refused_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"text": "a"},\n{"text": "\xc3\xa9\xff"}]')
    with pytest.raises(DataError) as caught:
        read_rows(path, "text")
    assert str(caught.value).startswith(f"{path}:2:12: invalid UTF-8 byte 0xff")


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not parquet that can be read"):
        read_rows(path, "text")


def test_what_is_no_data_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n")
    (tmp_path / "folder.jsonl").mkdir()
    for name, reason in [
        ("none.jsonl", "no such file"),
        ("folder.jsonl", "found a directory"),
        ("rows.csv", "unknown kind"),
    ]:
        with pytest.raises(DataError, match=reason) as caught:
            read_rows(tmp_path / name, "text")
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
