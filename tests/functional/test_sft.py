"""The SFT loss: rows D5, D7 and F5 as far as they are formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf.functional.sft import sft_loss

IGNORED = -100


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Two rows: a prompt of 2 and 3 tokens, EOS trained, right pads not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 13, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[IGNORED, IGNORED, 4, 9, 1, IGNORED], [IGNORED, IGNORED, IGNORED, 2, 12, 1]])
    return logits, labels


def test_f5_by_hand() -> None:
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[0, 1, 2] = 1.0  # predicts the label at position 2
    loss, count = sft_loss(logits, torch.tensor([[IGNORED, 3, 2]]))
    expected = -math.log(1 / 4) - math.log(math.e / (math.e + 3))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert count.item() == 2


def test_f5_equals_cross_entropy_of_torch(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    loss, count = sft_loss(logits, labels)
    expected = cross_entropy(logits[:, :-1].reshape(-1, 13), labels[:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert count.item() == 6

    unshifted = cross_entropy(logits.reshape(-1, 13), labels.reshape(-1), reduction="sum")
    assert (loss - unshifted).abs() > 0.1


@pytest.mark.parametrize(
    ("row", "position", "matters"),
    [
        (0, 0, False),  # predicts the second prompt token
        (0, 1, True),  # the last prompt token predicts the first response token
        (0, 3, True),  # predicts EOS
        (0, 4, False),  # EOS predicts a pad
        (1, 5, False),  # the last position predicts nothing
    ],
)
def test_d5_only_logits_that_predict_a_trained_label_matter(
    batch: tuple[Tensor, Tensor], row: int, position: int, matters: bool
) -> None:
    logits, labels = batch
    corrupted = logits.clone()
    corrupted[row, position] += torch.arange(13)
    assert (sft_loss(corrupted, labels)[0] != sft_loss(logits, labels)[0]).item() is matters


def test_f5_a_row_without_labels_is_zero(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    loss, count = sft_loss(logits, torch.full_like(labels, IGNORED))
    assert (loss.item(), count.item()) == (0.0, 0)


def test_d7_micro_batches_add_up(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    parts = [sft_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    loss, count = sft_loss(logits, labels)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, rtol=0, atol=1e-12)
    assert parts[0][1] + parts[1][1] == count
