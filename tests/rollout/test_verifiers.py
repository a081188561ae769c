"""Verifiers, by hand-made cases; each runs where a user's function does."""

from __future__ import annotations

from decimal import Decimal

import pytest

from rlhf.config.rewards import Reward
from rlhf.config.sections import Data
from rlhf.data.examples import PromptExample
from rlhf.data.rows import Row
from rlhf.errors import DataError
from rlhf.rollout.readers import checked_scores, open_readers, read
from rlhf.rollout.verifiers import last_number

NUMBERS = {
    "The answer is 42.": "42",
    "3-5": "5",
    "x=-5": "-5",
    "so it is 1,234.50": "1234.5",
    "1, 2 and 3": "3",
    "12,3456": "3456",
    "it owes -$3.20.": "-3.2",
    "(−7)": "-7",
    "-.5": "-0.5",
    "6.02e23 of them": "6.02e23",
    "12 apples, 7 pears": "7",
    "none": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_last_number_of_a_text(text):
    expected = NUMBERS[text]
    assert last_number(text) == (None if expected is None else Decimal(expected))


def verify(tmp_path, name: str, pairs: list[tuple[str, object]], column: str = "answer", **more) -> list[float | None]:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answer": "", "gold": ""}\n')
    config = Reward(source=f"verify:{name}", answer=column, **more)
    (reader,) = open_readers(config, Data(train=str(tmp_path / "rows.jsonl"))).values()
    rows = [Row(f"rows.jsonl:{index}", {"prompt": "p"}, {column: answer}) for index, (_, answer) in enumerate(pairs, start=1)]
    try:
        scores = read(reader, [PromptExample(0, [], row) for row in rows], [reply for reply, _ in pairs])
        return checked_scores(scores, len(pairs), reader.source)
    finally:
        reader.close()  # type: ignore[attr-defined]


def test_exact(tmp_path):
    pairs = [("Paris", "Paris"), (" Paris\n", "Paris"), ("paris", "Paris"), ("Paris.", "Paris"), ("7", 7), ("", "x")]
    assert verify(tmp_path, "exact", pairs) == [1, 1, 0, 0, 1, 0]


def test_numeric(tmp_path):
    pairs = [("it is 1,000.0", "so 5 * 200\n#### 1000"), ("it is 1000 or 1001", 1000), ("no idea", 3), ("0.50", 0.5)]
    assert verify(tmp_path, "numeric", pairs, column="gold") == [1, 0, 0, 1]


def test_regex(tmp_path):
    pairs = [("I say: yes", r"\byes\b"), ("eyes", r"\byes\b"), ("a\nb", "^b$"), ("a\nb", "(?m)^b$")]
    assert verify(tmp_path, "regex", pairs) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("numeric", "none", r"rows.jsonl:2: the answer 'none' is no number"),
        ("regex", "(", r"rows.jsonl:2: the answer '\(' is no regular expression"),
        ("exact", ["a"], r"rows.jsonl:2: the answer is list, expected text or a number"),
        ("exact", True, r"rows.jsonl:2: the answer is bool, expected text or a number"),
    ],
)
def test_an_answer_that_is_none_is_named(tmp_path, name, answer, message):
    with pytest.raises(DataError, match=rf"^verify:{name}: raised ValueError .*{message}"):
        verify(tmp_path, name, [("1", "1"), ("1", answer)], on_failure="mask")


def test_an_expression_that_takes_for_ever_has_a_deadline(tmp_path):
    with pytest.raises(DataError, match=r"^verify:regex: gave no answer within 1 s .*\(try 1 of 1\)"):
        verify(tmp_path, "regex", [("a" * 40 + "b", "(a+)+$")], timeout_s=1)


def test_a_column_that_is_not_there_is_told_at_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    with pytest.raises(DataError, match=r"^verify:exact: asks for gold; .* the columns of .*rows.jsonl: prompt, answer"):
        open_readers(Reward(source="verify:exact", answer="gold"), Data(train=str(tmp_path / "rows.jsonl")))
