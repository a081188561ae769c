"""Scores to token rewards: rows A5, A7, A8, C6, E11, E12 and F3."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.errors import CheckFailed
from rlhf.functional.masked import Moments
from rlhf.functional.rewards import apply_missing_eos, clip_scores, gain_bias, normalize_scores, token_rewards

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[-1.2, -1.5, -0.5]], dtype=torch.float64)
SCORE = torch.tensor([0.7], dtype=torch.float64)


def test_a8_kl_on_every_token_and_the_score_on_one() -> None:
    rewards = token_rewards(SCORE, LOGPROBS, REFERENCE, torch.ones(1, 3), coef=0.05)
    assert rewards[0].tolist() == pytest.approx([-0.01, 0.025, 0.7], abs=1e-12)
    identity = SCORE - 0.05 * (LOGPROBS - REFERENCE).sum()
    assert rewards.sum().item() == pytest.approx(identity.item(), abs=1e-12)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_a8_other_estimators_by_definition(name: str) -> None:
    d = (LOGPROBS - REFERENCE).numpy()[0]
    estimate = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[name]
    rewards = token_rewards(SCORE, LOGPROBS, REFERENCE, torch.ones(1, 3), coef=0.3, estimator=name)
    np.testing.assert_allclose(rewards[0].numpy(), -0.3 * estimate + [0, 0, 0.7], atol=1e-12)


def test_a5_the_score_is_on_the_last_response_token() -> None:
    # EOS is the third token, one pad follows: the score must be on EOS, not one later (TRL, N+) and not on the pad.
    mask = torch.tensor([[1, 1, 1, 0]])
    rewards = token_rewards(torch.ones(1), torch.zeros(1, 4), torch.zeros(1, 4), mask, coef=0.05)
    assert rewards.tolist() == [[0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")])
def test_a7_rewards_are_zero_outside_the_mask(garbage: float) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    logprobs = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([1.0, 2.0, garbage])  # the third row is excluded as a whole
    clean = token_rewards(torch.tensor([1.0, 2.0, 0.0]), logprobs, 2 * logprobs, mask, coef=0.1)
    dirty = token_rewards(
        scores,
        logprobs.masked_fill(mask == 0, garbage),
        (2 * logprobs).masked_fill(mask == 0, -garbage),
        mask,
        coef=0.1,
    )
    assert (clean[mask == 0] == 0).all()
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_c6_without_kl_the_rewards_are_the_scores(reference: Tensor | None) -> None:
    rewards = token_rewards(SCORE, LOGPROBS, reference, torch.ones(1, 3), coef=0.0)
    assert rewards.tolist() == [[0.0, 0.0, 0.7]]


def test_c6_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        token_rewards(SCORE, LOGPROBS, None, torch.ones(1, 3), coef=0.05)


@pytest.mark.parametrize("mask", [[[0, 0, 0]], [[1, 1, 1]], [[1, 0, 0]]])
def test_e12_empty_full_and_one_token_responses(mask: list[list[int]]) -> None:
    rewards = token_rewards(SCORE, LOGPROBS, LOGPROBS, torch.tensor(mask), coef=0.05)
    expected = torch.zeros(1, 3, dtype=torch.float64)
    if (length := sum(mask[0])) > 0:
        expected[0, length - 1] = 0.7
    assert torch.equal(rewards, expected)


@pytest.mark.parametrize(
    ("rule", "expected"), [("replace", [0.5, -1.0, -3.0]), ("subtract", [0.5, 3.0, -3.0]), ("none", [0.5, 2.0, -3.0])]
)
def test_e11_missing_eos(rule: str, expected: list[float]) -> None:
    scores, has_eos = torch.tensor([0.5, 2.0, -3.0]), torch.tensor([True, False, True])
    assert apply_missing_eos(scores, has_eos, rule, -1.0).tolist() == expected  # pyright: ignore[reportArgumentType]


def test_clip_scores() -> None:
    scores = torch.tensor([-20.0, -1.0, 0.0, 12.0])
    assert clip_scores(scores, 10.0).tolist() == [-10.0, -1.0, 0.0, 10.0]
    assert clip_scores(scores, None).tolist() == scores.tolist()


def test_f3_gain_and_bias() -> None:
    scores = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    gain, bias = gain_bias(scores)
    assert (gain, bias) == pytest.approx((0.4472135954999579, -1.7888543819998317), abs=1e-12)
    normalised = gain * scores.numpy() + bias
    assert (normalised.mean(), normalised.std()) == pytest.approx((0.0, 1.0), abs=1e-12)
    assert scores.std().item() ** -1 != pytest.approx(gain, abs=1e-2)  # the unbiased deviation would be noticed


def test_f3_another_target() -> None:
    scores = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    gain, bias = gain_bias(scores, target_mean=2.0, target_std=0.5)
    normalised = gain * scores.numpy() + bias
    assert (normalised.mean(), normalised.std()) == pytest.approx((2.0, 0.5), abs=1e-12)


def test_f3_equal_scores_are_refused() -> None:
    with pytest.raises(CheckFailed, match=r"all 3 scores are 0\.1"):
        gain_bias(torch.full((3,), 0.1))
    with pytest.raises(CheckFailed, match="1 of 3 scores are not finite"):
        gain_bias(torch.tensor([0.1, float("nan"), 0.3]))


@pytest.mark.parametrize("shift", [True, False])
def test_b6_scores_normalised_by_running_moments(shift: bool) -> None:
    rng = np.random.default_rng(0)
    seen, scores = rng.normal(3, 2, size=50), rng.normal(3, 2, size=4)
    expected = (scores - (seen.mean() if shift else 0.0)) / seen.std()
    moments = Moments.of(torch.from_numpy(seen[:20])).merge(Moments.of(torch.from_numpy(seen[20:])))
    normalised = normalize_scores(torch.from_numpy(scores), moments, shift=shift)
    np.testing.assert_allclose(normalised.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("seen", [[], [0.1], [0.1, 0.1, 0.1]])
def test_b4_scores_are_not_scaled_by_a_variance_of_nothing(seen: list[float]) -> None:
    moments = Moments.of(torch.tensor(seen))
    scores = torch.tensor([0.1, 1.1])
    assert normalize_scores(scores, moments, shift=False).tolist() == scores.tolist()
    shifted = normalize_scores(scores, moments)
    assert (shifted[1] - shifted[0]).item() == pytest.approx(1.0, abs=1e-6)


def test_the_penalty_in_the_score() -> None:
    """-1 + 1.2 = .2, -2 + 1.5 = -.5, 0: a sum of -.3, so .7 + .05 * .3 on the last token and nothing before it."""
    rewards = token_rewards(SCORE, LOGPROBS, REFERENCE, torch.ones(1, 3), coef=0.05, place="score")
    assert rewards[0].tolist() == pytest.approx([0.0, 0.0, 0.715], abs=1e-12)
