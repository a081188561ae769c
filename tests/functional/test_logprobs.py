"""Log-probabilities and entropy: rows C2, C5, D3 and D5."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.functional.logprobs import entropy, token_logprobs

# log softmax([2, 1, 0] / temperature), derived with numpy.
LOGITS = [2.0, 1.0, 0.0]
AT_TEMPERATURE = {
    1.0: [-0.40760596444438013, -1.4076059644443801, -2.40760596444438],
    0.7: [-0.2601184026447445, -1.688689831216173, -3.1172612597876017],
}


@pytest.mark.parametrize("temperature", AT_TEMPERATURE)
def test_c5_temperature_divides_the_logits(temperature: float) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64).expand(1, 3, 3)
    logprobs = token_logprobs(logits, torch.tensor([[0, 1, 2]]), temperature)
    assert logprobs[0].tolist() == pytest.approx(AT_TEMPERATURE[temperature], abs=1e-12)


def test_c5_a_forgotten_temperature_would_be_noticed() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64).expand(1, 3, 3)
    tokens = torch.tensor([[0, 1, 2]])
    mixed = token_logprobs(logits, tokens, 1.0) - token_logprobs(logits, tokens, 0.7)
    assert mixed.abs().min() > 0.1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_logprobs_and_entropy_by_definition(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(3, 4, 11)) * 5, rng.integers(0, 11, size=(3, 4))
    weights = np.exp(logits / temperature)
    probabilities = weights / weights.sum(axis=-1, keepdims=True)
    expected_logprobs = np.log(np.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0])
    expected_entropy = -(probabilities * np.log(probabilities)).sum(axis=-1)

    logprobs = token_logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), temperature)
    np.testing.assert_allclose(logprobs.numpy(), expected_logprobs, rtol=0, atol=1e-10)
    np.testing.assert_allclose(entropy(torch.from_numpy(logits), temperature).numpy(), expected_entropy, atol=1e-10)


def test_entropy_of_a_fair_choice_and_of_a_certain_one() -> None:
    logits = torch.stack([torch.zeros(8), torch.eye(8)[3] * 1e4]).unsqueeze(0)
    assert entropy(logits)[0].tolist() == pytest.approx([math.log(8), 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_computed_in_float32_or_wider(dtype: torch.dtype, result: torch.dtype) -> None:
    logits = torch.tensor([[LOGITS]], dtype=dtype)
    logprobs = token_logprobs(logits, torch.tensor([[1]]))
    assert logprobs.dtype == entropy(logits).dtype == result
    assert logprobs.item() == pytest.approx(AT_TEMPERATURE[1.0][1], abs=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logprobs = token_logprobs(torch.tensor([[[1e4, 0.0], [-1e4, -1e4]]]), torch.tensor([[0, 1]]))
    assert logprobs[0].tolist() == pytest.approx([0.0, -math.log(2)], abs=1e-3)  # float32 near 1e4 is no finer


@pytest.mark.parametrize("position", range(4))
def test_d5_each_logit_predicts_one_token_only(position: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(2, 4, 9, generator=generator), torch.randint(9, (2, 4), generator=generator)
    corrupted = logits.clone()
    corrupted[0, position] = torch.randn(9, generator=generator)
    changed = token_logprobs(corrupted, tokens) != token_logprobs(logits, tokens)
    assert changed.nonzero().tolist() == [[0, position]]


def test_d3_neighbours_in_the_batch_do_not_change_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(3, 5, 50, generator=generator), torch.randint(50, (3, 5), generator=generator)
    together = token_logprobs(logits, tokens, 0.7)
    alone = torch.cat([token_logprobs(logits[i : i + 1], tokens[i : i + 1], 0.7) for i in range(3)])
    assert torch.equal(together, alone)


def test_gradient_is_one_hot_minus_softmax() -> None:
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[3, 0]])
    token_logprobs(logits, tokens, 0.5).sum().backward()
    assert logits.grad is not None
    weights = np.exp(logits.detach().numpy() / 0.5)
    expected = (np.eye(5)[tokens.numpy()] - weights / weights.sum(axis=-1, keepdims=True)) / 0.5
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-12)
