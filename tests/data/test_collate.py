"""Rows as one sequence: which token stands where, what is read, and what is shared."""

from __future__ import annotations

import pytest

from rlhf.data.collate import Row, last_row, ranking_batch, reply_batch, reply_row, sft_batch, token_batch
from rlhf.data.examples import PairExample, RatedExample, SftExample, mismatched
from rlhf.errors import DataError


def test_rows_one_after_the_other():
    batch = token_batch([reply_row([2, 3], [4, 5, 1]), reply_row([6], [7])])
    assert batch.ids.tolist() == [2, 3, 4, 5, 1, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.read.tolist() == [1, 2, 3, 5]  # the place before each token of a reply
    assert batch.targets.tolist() == [4, 5, 1, 7]
    assert [tuple(segment) for segment in batch.segments] == [(0, 5, None), (5, 2, None)]
    assert batch.tokens == ((2, 3, 4, 5, 1), (6, 7))


def test_a_prompt_of_several_rows_stands_there_once():
    rows = [reply_row([2, 3], [4, 5]), reply_row([9], [4]), reply_row([2, 3], [6])]
    batch = token_batch(rows)
    assert batch.ids.tolist() == [2, 3, 4, 5, 9, 4, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert [tuple(segment) for segment in batch.segments] == [(0, 2, None), (2, 2, 0), (4, 2, None), (6, 1, 0)]
    assert batch.read.tolist() == [1, 2, 4, 1]  # both replies are predicted from the prompt's last token
    assert batch.targets.tolist() == [4, 5, 4, 6]
    apart = token_batch(rows, share_prompts=False)
    assert apart.ids.tolist() == [2, 3, 4, 5, 9, 4, 2, 3, 6]
    assert all(segment.parent is None for segment in apart.segments)
    assert apart.targets.tolist() == batch.targets.tolist()


def test_the_last_token_is_followed_by_nothing():
    batch = token_batch([last_row([2, 3], [4]), last_row([5], []), last_row([2, 3], [])])
    assert batch.ids[batch.read].tolist() == [4, 5, 3]
    assert batch.targets.tolist() == [0, 0, 0]
    assert all(segment.parent is None for segment in batch.segments)  # a row that is all prompt continues nothing


def test_pairs_alternate():
    batch = ranking_batch([PairExample([2], [3, 4], [5]), PairExample([6], [7], [8])])
    assert batch.ids.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert batch.ids[batch.read].tolist() == [4, 5, 7, 8]


def test_f5_only_what_predicts_a_trained_token_is_read():
    batch = sft_batch([SftExample([5, 6, 7, 8], [True, False, True, True]), SftExample([9, 3], [False, True])])
    assert batch.read.tolist() == [1, 2, 4]  # the first token of a row is predicted by nothing, though it is trained
    assert batch.targets.tolist() == [7, 8, 3]
    assert token_batch([Row([], [1, 2], [])]).read.tolist() == []


def test_replies_of_a_pair_are_read_behind_their_one_prompt():
    batch = reply_batch([PairExample([2, 3], [4, 1], [5])])
    assert batch.ids.tolist() == [2, 3, 4, 1, 5]
    assert batch.read.tolist() == [1, 2, 1]
    assert batch.targets.tolist() == [4, 1, 5]


def test_a_mismatched_reply_is_that_of_the_row_before_with_another_prompt():
    prompts, replies = [[2], [2], [3], [3], [2]], [[11], [12], [13], [14], [15, 16]]
    rows = [RatedExample(prompt, reply, True) for prompt, reply in zip(prompts, replies, strict=True)]
    found = mismatched(rows, limit=2)
    assert [row.prompt for row in found] == prompts
    assert [row.reply for row in found] == [[14], [14], [12], [12], [14]]  # the first two go round to the end
    assert mismatched([rows[2], rows[4]], limit=2)[0].reply == [15]  # cut
    with pytest.raises(DataError, match="all rows have the same prompt"):
        mismatched(rows[:2], limit=2)
