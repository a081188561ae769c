"""`rlhf score`, against transformers' own scores, the user's functions called by hand, and what `rlhf eval` says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_generate_eval import evaluated, generated, own_scores, rows_of

from rlhf.cli import main

FUNCTIONS = """\
def length(responses):
    return [len(response) for response in responses]

def weigh(prompts, responses, finished, weight):
    return [None if w < 0 else w * (len(p) + ended) for p, ended, w in zip(prompts, finished, weight)]

def tokens(tokens):
    return [len(row) for row in tokens]

def nothing(responses):
    return [float("nan")] * len(responses)
"""


def scored(capsys, output: Path, *words: object) -> tuple[list[dict], dict]:
    """(rows written, the summary)."""
    assert main(["score", *map(str, words), "--output", str(output), "--json"]) == 0
    return rows_of(output), json.loads(capsys.readouterr().out)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_are_transformers_own(llamas, tmp_path, capsys):
    rows = [{**row, "id": at} for at, row in enumerate(rows_of(llamas / "sft.jsonl"))]
    file = write(tmp_path / "rows.jsonl", *rows)
    found, summary = scored(capsys, tmp_path / "scores.jsonl", llamas / "critic", file, "--batch-size", 5)
    expected = own_scores(llamas / "critic", rows, "completion")
    assert [{name: row[name] for name in ("prompt", "completion", "id")} for row in found] == rows
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5)
    mean = sum(expected) / len(expected)
    assert summary["mean"] == pytest.approx(mean, abs=1e-5)
    assert summary["deviation"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in expected) / len(expected)), abs=1e-5)
    assert (summary["least"], summary["most"]) == pytest.approx((min(expected), max(expected)), abs=1e-5)
    assert summary["deviation"] > 1e-3


def test_pairs_agree_with_eval(llamas, tmp_path, capsys):
    found, summary = scored(capsys, tmp_path / "scores.jsonl", llamas / "critic", llamas / "pairs.jsonl")
    rows = rows_of(llamas / "pairs.jsonl")
    for side in ("chosen", "rejected"):
        assert [row[f"score_{side}"] for row in found] == pytest.approx(own_scores(llamas / "critic", rows, side), abs=1e-5)
    figures = evaluated(capsys, llamas / "critic", "--data", llamas / "pairs.jsonl")["figures"]["fp32"]
    for name in ("accuracy", "accuracy_low", "accuracy_high"):
        assert summary[name] == pytest.approx(figures[name])
    assert (summary["pairs"], summary["replies"]) == (37, 74)
    assert main(["score", str(llamas / "critic"), str(llamas / "pairs.jsonl"), "--output", str(tmp_path / "b.jsonl")]) == 0
    assert f"the chosen reply scores higher in {figures['accuracy']:.3f}" in capsys.readouterr().out


def test_a_reply_that_never_ended_has_no_end(llamas, tmp_path, capsys):
    """Rows as `rlhf generate` leaves them: `response`, and whether it ended."""
    words = (llamas / "model", "--data", llamas / "prompts.jsonl", "--max-new-tokens", 4)
    rows = [row for row in generated(tmp_path / "replies.jsonl", *words) if row["response"]]
    capsys.readouterr()
    found, _ = scored(capsys, tmp_path / "scores.jsonl", llamas / "critic", write(tmp_path / "rows.jsonl", *rows))
    ended = own_scores(llamas / "critic", [{**row, "response": f" {row['response']}"} for row in rows], "response")
    assert {row["finished"] for row in rows} == {True, False}
    for row, score in zip(found, ended, strict=True):
        assert (row["score"] == pytest.approx(score, abs=1e-5)) == row["finished"]


def test_functions_and_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTIONS)
    rows = [
        {"prompt": "ab", "response": "ccc", "weight": 2, "finished": True},
        {"prompt": "a", "response": "c", "weight": 3, "finished": False},
        {"prompt": "abc", "response": "cc", "weight": -1},
    ]
    write(Path("rows.jsonl"), *rows)
    found, summary = scored(capsys, Path("a.jsonl"), "mine.py:weigh", "rows.jsonl")
    assert [row["score"] for row in found] == [2 * 3, 3 * 1, None]
    assert [row["completion"] for row in found] == ["ccc", "c", "cc"]
    assert (summary["rows"], summary["replies"], summary["scored"], summary["mean"]) == (3, 3, 2, 4.5)
    several = ("--reward.sources.long.source", "mine.py:length", "--reward.sources.own.source", "mine.py:weigh")
    found, _ = scored(capsys, Path("b.jsonl"), "--data", "rows.jsonl", *several, "--reward.sources.own.weight", "-0.5")
    assert [row["score"] for row in found] == [3 - 3, 1 - 1.5, None]
    assert found[1]["scores"] == {"long": 1.0, "own": 3.0}
    assert found[2]["scores"] == {"long": 2.0, "own": None}
    doubled, _ = scored(capsys, Path("c.jsonl"), "mine.py:length", "rows.jsonl", "--reward.weight", 2)
    assert [row["score"] for row in doubled] == [6, 2, 4]


def test_a_chat_is_scored_by_its_last_reply(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def both(prompts, responses):\n    return [10 * len(p) + len(r) for p, r in zip(prompts, responses)]\n"
    )
    turns = [("user", "a"), ("assistant", "bb"), ("user", "ccc"), ("assistant", "dddd")]
    messages = [{"role": role, "content": text} for role, text in turns]
    write(Path("rows.jsonl"), {"messages": messages, "id": 7})
    found, _ = scored(capsys, Path("a.jsonl"), "mine.py:both", "rows.jsonl")
    assert found == [{"messages": messages, "id": 7, "score": 34.0}]
    write(Path("pairs.jsonl"), {"chosen": messages, "rejected": [*messages[:-1], {"role": "assistant", "content": "e"}]})
    found, _ = scored(capsys, Path("b.jsonl"), "mine.py:both", "pairs.jsonl")
    assert (found[0]["score_chosen"], found[0]["score_rejected"]) == (34.0, 31.0)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("critic none.jsonl", 65, "none.jsonl"),
        ("critic", 78, "data.file: missing"),
        ("critic sft.jsonl more", 2, "`more`: expected a flag"),
        ("model sft.jsonl", 65, "model"),
        ("count:a sft.jsonl", 78, "count:a goes by the tokens of a policy, and these replies are texts"),
        ("mine.py:tokens sft.jsonl", 78, "mine.py:tokens goes by the tokens of a policy"),
        ("mine.py:weigh sft.jsonl", 65, "mine.py:weigh: asks for weight"),
        ("mine.py:nothing sft.jsonl", 1, "sft.jsonl:1: the score is nan"),
        ("mine.py:length prompts.jsonl", 65, "prompts.jsonl:1: completion is missing"),
        ("mine.py:length open.jsonl", 65, "open.jsonl:1: messages must ask something and end with the assistant's reply"),
        ("mine.py:length clash.jsonl", 65, "clash.jsonl:1: has a column 'score'"),
        ("mine.py:length clash.jsonl --data.extra-columns fail", 65, "unknown column 'score'"),
        ("mine.py:length sft.jsonl --batch-size 0", 78, "expected a whole number, at least 1"),
    ],
)
def test_a_mistake_is_one_message(llamas, tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "critic", "sft.jsonl", "prompts.jsonl"):
        (tmp_path / name).symlink_to(llamas / name)
    Path("mine.py").write_text(FUNCTIONS)
    ask = {"role": "user", "content": "a"}
    write(Path("open.jsonl"), {"messages": [ask, {"role": "assistant", "content": "b"}, ask]})
    write(Path("clash.jsonl"), {"prompt": "a", "completion": "b", "score": 1})
    assert main(["score", *words.split(), "--output", "scores.jsonl"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("rlhf: error: ") == 1
    assert message in printed.err
    assert not Path("scores.jsonl").exists()
