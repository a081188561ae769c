"""Ranked replies: which rows there are, what pairs they make, and how they go through a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rlhf.config.sections import Data
from rlhf.data.collate import comparisons, last_row, ranking_batch, token_batch
from rlhf.data.examples import Comparison, RankedExample, ranked_examples, reference_examples
from rlhf.data.rows import read_rows
from rlhf.data.templates import Template
from rlhf.errors import DataError
from rlhf.models.load import load_tokenizer
from rlhf.training.tiny import write_tiny_model


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Template:
    """Tokens 2 to 9 are the words a to h, 1 ends a reply."""
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, seed=0)
    return Template(load_tokenizer(str(directory / "model")), "plain", [1])


READ: list[tuple[dict[str, Any], list[str], list[float], float]] = [
    ({"chosen": "a", "rejected": "b"}, ["a", "b"], [0, 1], 0),
    ({"chosen": "a", "rejected": "b", "margin": 2}, ["a", "b"], [0, 1], 2),
    ({"chosen": "a", "rejected": "b", "tie": True}, ["a", "b"], [0, 0], 0),
    ({"chosen": "a", "rejected": "b", "tie": False, "margin": 0.5}, ["a", "b"], [0, 1], 0.5),
    ({"responses": ["a", "b", "c"]}, ["a", "b", "c"], [0, 1, 2], 0),
    ({"responses": ["a", "b", "c"], "ranks": [2, 1, 2]}, ["a", "b", "c"], [2, 1, 2], 0),
    ({"responses": ["a", "b"], "scores": [0.5, 7]}, ["a", "b"], [-0.5, -7], 0),
]


@pytest.mark.parametrize(("row", "responses", "ranks", "margin"), READ)
def test_rows(row, responses, ranks, margin, tmp_path):
    rows = read_rows(write(tmp_path / "rows.jsonl", {"prompt": "p"} | row), "ranking")
    assert rows.rows[0].fields == {"prompt": "p", "responses": responses, "ranks": ranks, "margin": margin}


def test_responses_may_be_messages_and_columns_mapped(tmp_path):
    turn, reply = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    path = write(tmp_path / "rows.jsonl", {"prompt": [turn], "answers": ["b", [reply]]})
    found = read_rows(path, "ranking", columns={"responses": "answers"}).rows[0].fields
    assert found["responses"] == [[{"role": "assistant", "content": "b"}], [reply]]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"responses": ["a"]}, "responses is a list of 1, expected a list of at least two replies"),
    ({"responses": "a"}, "responses is a string, expected a list of at least two"),
    ({"responses": ["a", ""]}, r"responses\[1\] is empty"),
    ({"responses": ["a", None]}, r"responses\[1\]"),
    ({"responses": ["a", [{"role": "assistant", "content": "a"}]]}, r"responses\[1\] is messages, but the prompt is a string"),
    ({"responses": ["a", "b"], "ranks": [1]}, "ranks is a list of 1, expected a list of 2 numbers"),
    ({"responses": ["a", "b"], "scores": [1, "x"]}, r"scores\[1\] is a string, expected a number"),
    ({"responses": ["a", "b"], "scores": [1, True]}, r"scores\[1\] is a boolean, expected a number"),
    ({"responses": ["a", "b"], "scores": [1, 10**400]}, r"scores\[1\] is 1000.*, expected a number that float32 holds"),
    ({"responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]}, "scores and ranks both give the order"),
    ({"responses": ["a", "b"], "chosen": "a"}, "chosen does not go with responses"),
    ({"responses": ["a", "b"], "margin": 1}, "margin does not go with responses"),
    ({"chosen": "a", "rejected": "b", "ranks": [1, 2]}, "ranks does not go with chosen"),
    ({"chosen": "a", "rejected": "b", "margin": -1}, "margin is -1, expected 0 or more"),
    ({"chosen": "a", "rejected": "b", "margin": None}, "margin is null, expected a number"),
    ({"chosen": "a", "rejected": "b", "margin": 1, "tie": True}, "expected 0 or more, and 0 for a tie"),
    ({"chosen": "a", "rejected": "b", "tie": 1}, "tie is a number, expected true or false"),
    ({"chosen": "a"}, "rejected is missing"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED)
def test_refused(row, message, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "p"} | row)
    with pytest.raises(DataError, match=message) as error:
        read_rows(path, "ranking")
    assert str(error.value).startswith(f"{path}:1: ")


def test_pairs_of_a_prompt(template, tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1, 2]},
        {"prompt": "a b", "chosen": "c", "rejected": "d", "margin": 2},
        {"prompt": "a", "chosen": "c", "rejected": "d", "tie": True},
    )
    found = ranked_examples(path, Data(train=path), template)
    three, pair, tie = found.items
    assert three.replies == [[3, 1], [4, 1], [5, 1]]
    assert three.comparisons == [Comparison(1, 0, False), Comparison(0, 2, True), Comparison(1, 2, False)]
    assert (pair.comparisons, tie.comparisons) == ([Comparison(0, 1, False)], [Comparison(0, 1, True)])
    assert (len(three), len(pair)) == (3, 4)
    assert "7 replies to 3 prompts make 5 pairs; a prompt counts once" in found.notes
    assert "2 of 5 pairs are ties" in found.notes
    batch = ranking_batch(found.items)
    assert batch.ids.tolist() == [2, 3, 1, 4, 1, 5, 1, 2, 3, 4, 1, 5, 1, 4, 1, 5, 1]  # a prompt once, for all rows that have it
    assert batch.ids[batch.read].tolist() == [1] * 7
    pairs = comparisons(found.items, like=torch.empty(0))
    assert pairs.better.tolist() == [1, 0, 1, 3, 5]
    assert pairs.worse.tolist() == [0, 2, 2, 4, 6]
    assert pairs.target.tolist() == [1, 0.5, 1, 1, 0.5]
    assert pairs.margin.tolist() == [0, 0, 0, 2, 0]
    assert pairs.weight.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 1])
    assert pairs.decided.tolist() == [0.5, 0, 0.5, 1, 0]


def test_f4_replies_equal_after_truncation_make_no_pair(template, tmp_path):
    rows = [
        {"prompt": "a", "responses": ["b c d e", "b c d f", "g"]},
        {"prompt": "a", "responses": ["b c d e", "b c d f", "b c d g"]},
        {"prompt": "a", "chosen": "b c d e", "rejected": "b c d f"},
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    found = ranked_examples(path, Data(train=path, max_length=4, too_long="truncate"), template)
    assert [example.comparisons for example in found.items] == [[Comparison(0, 2, False), Comparison(1, 2, False)]]
    assert "5 pairs dropped: chosen and rejected are the same tokens (after truncation)" in found.notes
    whole = ranked_examples(path, Data(train=path), template)
    assert sum(len(example.comparisons) for example in whole.items) == 7


def test_a_pair_goes_through_the_model_as_ever():
    ranked = ranking_batch([RankedExample([2], [[3, 4], [5]], [0, 1]), RankedExample([6], [[7], [8]], [0, 1])])
    pairs = token_batch([last_row([2], [3, 4]), last_row([2], [5]), last_row([6], [7]), last_row([6], [8])])
    assert ranked.ids.tolist() == pairs.ids.tolist()
    assert ranked.read.tolist() == pairs.read.tolist()
    assert ranked.segments == pairs.segments


def test_reference_answers(template, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "d e f g h"})
    config = Data(train=path, max_length=5, too_long="truncate", columns={"chosen": "better"})
    found = reference_examples(path, config, template)
    assert [(one.prompt, one.replies, one.comparisons) for one in found.items] == [
        ([2, 3], [[4, 1]], []),
        ([2], [[5, 6, 7, 8]], []),
    ]
    write(tmp_path / "rows.jsonl", {"text": "a b"})
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: a reference answer is a row of prompt and completion, this one has text"
    ):
        reference_examples(path, config, template)
