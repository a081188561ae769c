"""The SFT loss, as far as it is a formula; which tokens it is taken on is tests/data/test_collate.py's to say."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.sft import sft_loss


def test_f5_by_hand() -> None:
    logits = torch.zeros(2, 4, dtype=torch.float64)
    logits[1, 2] = 1.0
    loss = sft_loss(token_logprobs(logits, torch.tensor([3, 2])))
    assert loss.item() == pytest.approx(-math.log(1 / 4) - math.log(math.e / (math.e + 3)), abs=1e-12)


def test_f5_equals_cross_entropy_of_torch() -> None:
    logits = torch.randn(9, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.arange(9)
    loss = sft_loss(token_logprobs(logits, tokens))
    torch.testing.assert_close(loss, cross_entropy(logits, tokens, reduction="sum"), rtol=0, atol=1e-12)
    assert (loss - cross_entropy(logits, tokens)).abs() > 0.1


def test_f5_nothing_trained_is_zero() -> None:
    assert sft_loss(torch.zeros(0)).item() == 0.0
