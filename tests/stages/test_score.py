"""`rlhf score`, against transformers' own scores, the user's functions called by hand, and what `rlhf eval` says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from test_generate_eval import evaluated, generated, own_scores, rows_of

from rlhf.cli import main
from rlhf.errors import DataError
from rlhf.rollout.readers import AT_ONCE
from rlhf.training.inference import load_reward

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
    rows = generated(tmp_path / "replies.jsonl", *words)
    capsys.readouterr()
    found, _ = scored(capsys, tmp_path / "scores.jsonl", llamas / "critic", tmp_path / "replies.jsonl")
    assert [{**row, "score": score["score"]} for row, score in zip(rows, found, strict=True)] == found
    ended = own_scores(llamas / "critic", [{**row, "response": f" {row['response']}"} for row in rows], "response")
    assert {(row["finished"], row["response"] == "") for row in rows} == {(True, True), (True, False), (False, False)}
    for row, score in zip(found, ended, strict=True):
        assert (row["score"] == pytest.approx(score, abs=1e-5)) == row["finished"]
    both = [{"prompt": row["prompt"], "response_fp32": row["response"], "finished_fp32": row["finished"]} for row in rows]
    words = (write(tmp_path / "both.jsonl", *both), "--data.columns.completion", "response_fp32")
    again, _ = scored(capsys, tmp_path / "again.jsonl", llamas / "critic", *words)
    assert [row["score"] for row in again] == [row["score"] for row in found]


def test_empty_replies_and_pairs_of_the_same(tmp_path, monkeypatch, capsys):
    """Of no use to learn from, and scored as any other; two of the same say nothing of the accuracy."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTIONS)
    rows = [{"prompt": "a", "response": ""}, {"prompt": [{"role": "user", "content": "a"}], "response": ""}]
    found, _ = scored(capsys, Path("a.jsonl"), "mine.py:length", write(Path("rows.jsonl"), *rows))
    assert found == [{**row, "score": 0.0} for row in rows]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}]
    pairs = [("bb", ""), ("bb", "bb"), (chat, chat), ("b", "cc"), ("bb", "cc")]
    rows = [{"prompt": "a", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    found, summary = scored(capsys, Path("b.jsonl"), "mine.py:length", write(Path("pairs.jsonl"), *rows))
    scores = [(2, 0), (2, 2), (2, 2), (1, 2), (2, 2)]
    assert found == [{**row, "score_chosen": a, "score_rejected": b} for row, (a, b) in zip(rows, scores, strict=True)]
    assert (summary["replies"], summary["pairs"], summary["accuracy"]) == (10, 3, (1 + 0 + 0.5) / 3)
    write(Path("empty.jsonl"), {"prompt": "", "response": "b"})
    assert main(["score", "mine.py:length", "empty.jsonl", "--output", "c.jsonl"]) == 65  # the prompt may not be


def test_columns_of_others_are_no_pairs(tmp_path, monkeypatch, capsys):
    """score_chosen and score_rejected of a row with one reply are its author's; so is `scores`, with one source."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTIONS)
    row = {"prompt": "a", "completion": "bb", "score_chosen": 1, "score_rejected": "2", "scores": 3}
    found, summary = scored(capsys, Path("a.jsonl"), "mine.py:length", write(Path("rows.jsonl"), row))
    assert found == [{**row, "score": 2.0}]
    assert "pairs" not in summary


def test_more_replies_than_one_call_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTIONS)
    rows = [{"prompt": "a", "completion": "b" * (1 + at % 7)} for at in range(2 * AT_ONCE + 3)]
    found, summary = scored(capsys, Path("a.jsonl"), "mine.py:length", write(Path("rows.jsonl"), *rows))
    assert [row["score"] for row in found] == [len(row["completion"]) for row in rows]
    assert summary["scored"] == len(rows)


def test_what_is_too_long(llamas, tmp_path, capsys):
    """The model has 64 positions, and an end is one of them: the words of the longest rows are counted by hand."""
    rows = [{"prompt": "a", "completion": " b" * count} for count in (3, 62, 63, 5)]
    file, words = write(tmp_path / "rows.jsonl", *rows), [llamas / "critic", tmp_path / "rows.jsonl"]
    assert main(["score", *map(str, words), "--output", str(tmp_path / "a.jsonl")]) == 65
    message = capsys.readouterr().err
    assert f"{file}:3: 65 tokens of the reward model" in message
    assert "more than 64, the positions it has; shorten the row, or set data.too_long to skip" in message
    with pytest.raises(DataError, match=r"positions .* which has 64: shorten the prompt or the reply"):
        load_reward(llamas / "critic").score(["a"], [" b" * 63])  # which has no options to name
    whole, _ = scored(capsys, tmp_path / "b.jsonl", llamas / "critic", write(tmp_path / "short.jsonl", *rows[:2], rows[3]))
    assert main(["score", *map(str, words), "--data.too-long", "skip", "--output", str(tmp_path / "c.jsonl")]) == 0
    printed = capsys.readouterr()
    assert "1 of 4 replies are too long, and get no score" in printed.err
    assert "1 without a score" in printed.out
    found = rows_of(tmp_path / "c.jsonl")
    assert found[2] == {**rows[2], "score": None}
    assert [found[at]["score"] for at in (0, 1, 3)] == pytest.approx([row["score"] for row in whole], abs=1e-6)
    several = (
        "--data",
        file,
        "--reward.sources.one.source",
        llamas / "critic",
        "--reward.sources.two.source",
        llamas / "critic",
    )
    found, _ = scored(capsys, tmp_path / "d.jsonl", *several, "--data.too-long", "skip", "--data.max-length", 6)
    assert [row["score"] is None for row in found] == [False, True, True, True]  # 5, 64, 65 and 7 tokens
    assert [row["scores"]["two"] is None for row in found] == [False, True, True, True]


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
    assert [{name: row[name] for name in given} for row, given in zip(found, rows, strict=True)] == rows
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
        ("mine.py:nothing sft.jsonl", 1, "sft.jsonl:1: the score of its reply is nan"),
        ("mine.py:length prompts.jsonl", 65, "prompts.jsonl:1: completion is missing"),
        ("mine.py:length open.jsonl", 65, "open.jsonl:1: messages must ask something and end with the assistant's reply"),
        ("mine.py:length clash.jsonl", 65, "clash.jsonl:1: has a column 'score'"),
        (
            "--data clash2.jsonl --reward.sources.a.source mine.py:length --reward.sources.b.source mine.py:length",
            65,
            "clash2.jsonl:1: has a column 'scores_chosen'",
        ),
        ("mine.py:length ended0.jsonl", 65, "ended0.jsonl:1: finished is 0, expected true or false"),
        ("mine.py:length ended1.jsonl", 65, 'ended1.jsonl:1: finished is "false", expected true or false'),
        ("mine.py:length ended2.jsonl", 65, "ended2.jsonl:1: finished is null, expected true or false"),
        ("mine.py:length sft.jsonl --data.too-long skip", 78, "data.too_long has no meaning without a reward model"),
        ("mine.py:length sft.jsonl --data.max-length 9", 78, "data.max_length has no meaning without a reward model"),
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
    write(Path("clash2.jsonl"), {"prompt": "a", "chosen": "b", "rejected": "c", "scores_chosen": 1})
    for at, ended in enumerate((0, "false", None)):
        write(Path(f"ended{at}.jsonl"), {"prompt": "a", "completion": "b", "finished": ended})
    assert main(["score", *words.split(), "--output", "scores.jsonl"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("rlhf: error: ") == 1
    assert message in printed.err
    assert not Path("scores.jsonl").exists()
