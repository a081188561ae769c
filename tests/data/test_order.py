"""Which rows a step takes (facts: D12, G6): counted by hand, not by the code."""

from __future__ import annotations

import pytest

from rlhf.config.sections import Schedule
from rlhf.data.order import Batches, chunks, minibatches, row_seeds

THREE_EPOCHS = Schedule(length=3, unit="epochs")


def test_d12_every_row_once_an_epoch():
    batches = Batches(10, 4, 5, THREE_EPOCHS)
    steps = [batches[step] for step in range(batches.length)]
    rows = [row for step in steps for row in step]
    assert [len(step) for step in steps] == [4] * 7 + [2]
    for epoch in range(3):
        assert sorted(rows[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert rows[:10] != rows[10:20]


def test_a_batch_is_a_function_of_seed_and_step():
    steps = [Batches(10, 4, 5, THREE_EPOCHS)[step] for step in range(8)]
    assert Batches(10, 4, 5, THREE_EPOCHS)[2] == steps[2]
    assert Batches(10, 4, 6, THREE_EPOCHS)[2] != steps[2]


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_without_epochs_there_is_no_last_row(unit):
    batches = Batches(3, 4, 5, Schedule(length=7, unit=unit))
    assert batches.length == 7
    assert all(len(batches[step]) == 4 for step in range(20))


def test_every_epoch_of_an_update_takes_every_reply_once():
    taken = list(minibatches(5, 2, 2, seed=3))
    assert taken[:3] == [[0, 1], [2, 3], [4]]  # as they were scored
    assert sorted(row for minibatch in taken[3:] for row in minibatch) == list(range(5))
    assert taken[3:] != taken[:3]


def test_chunks():
    assert chunks([1, 2, 3], 2) == [[1, 2], [3]]


def test_g6_equal_prompts_have_unequal_seeds():
    seeds = row_seeds(3, [7, 7, 8, 7])
    assert len(set(seeds)) == 4
    assert seeds == row_seeds(3, [7, 7, 8, 7])
    assert all(0 <= seed < 2**63 for seed in seeds)
