"""Advantages and returns: rows A1-A7, A9, D6 and E12."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from rlhf.functional.advantages import BASELINES, deviation, gae, same_scores
from rlhf.functional.masked import Moments, whiten

Array = NDArray[np.float64]


def one_row(rewards: list[float], values: list[float], gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Advantages and returns of one row without pads."""
    r, v = torch.tensor([rewards], dtype=torch.float64), torch.tensor([values], dtype=torch.float64)
    advantages, returns = gae(r, v, torch.ones_like(r), gamma, lam)
    return advantages[0].tolist(), returns[0].tolist()


def by_definition(rewards: Array, values: Array, gamma: float, lam: float) -> Array:
    """A_t = sum over j >= t of (gamma lam)^(j - t) delta_j, with value 0 after the end."""
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values
    return np.array([sum((gamma * lam) ** (j - t) * deltas[j] for j in range(t, len(deltas))) for t in range(len(deltas))])


def batch(lengths: list[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values (pads hold numbers too) and the right-padded mask."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, len(lengths), length, generator=generator, dtype=torch.float64)
    return rewards, values, (torch.arange(length) < torch.tensor(lengths).unsqueeze(-1)).long()


@st.composite
def episodes(draw: st.DrawFn) -> tuple[Array, Array, float, float]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = draw(st.integers(1, 24))
    return rng.normal(size=length), rng.normal(size=length), draw(st.floats(0.5, 1.0)), draw(st.floats(0.0, 1.0))


def test_a1_gae_basic() -> None:
    advantages, returns = one_row([0.0, 0.0, 1.0], [0.5, 0.4, 0.3], gamma=1.0, lam=0.95)
    assert advantages == pytest.approx([0.43675, 0.565, 0.7], abs=1e-12)
    assert returns == pytest.approx([0.93675, 0.965, 1.0], abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(episodes())
def test_a2_sum_of_discounted_deltas(episode: tuple[Array, Array, float, float]) -> None:
    rewards, values, gamma, lam = episode
    advantages, returns = one_row(rewards.tolist(), values.tolist(), gamma, lam)
    expected = by_definition(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-10)
    np.testing.assert_allclose(returns, expected + values, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(episodes())
def test_a2_lambda_one_is_monte_carlo(episode: tuple[Array, Array, float, float]) -> None:
    rewards, values, gamma, _ = episode
    length = len(rewards)
    monte_carlo = [sum(gamma ** (j - t) * rewards[j] for j in range(t, length)) for t in range(length)]
    advantages, returns = one_row(rewards.tolist(), values.tolist(), gamma, 1.0)
    np.testing.assert_allclose(advantages, np.array(monte_carlo) - values, atol=1e-10)
    np.testing.assert_allclose(returns, monte_carlo, atol=1e-10)  # whatever the values are


@settings(deadline=None, max_examples=30)
@given(episodes())
def test_a2_lambda_zero_is_one_step(episode: tuple[Array, Array, float, float]) -> None:
    rewards, values, gamma, _ = episode
    advantages, _ = one_row(rewards.tolist(), values.tolist(), gamma, 0.0)
    np.testing.assert_allclose(advantages, rewards + gamma * np.append(values[1:], 0.0) - values, atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_a3_a_perfect_critic_leaves_no_advantage(lam: float) -> None:
    rewards = np.array([0.1, -0.2, 0.3, 1.0])
    values = np.cumsum(rewards[::-1])[::-1]
    advantages, _ = one_row(rewards.tolist(), values.tolist(), gamma=1.0, lam=lam)
    np.testing.assert_allclose(advantages, 0.0, atol=1e-12)


def test_a4_terminal_score_decays_by_lambda() -> None:
    advantages, _ = one_row([0.0] * 5 + [2.0], [0.0] * 6, gamma=1.0, lam=0.95)
    assert advantages == pytest.approx([1.547561875, 1.6290125, 1.71475, 1.805, 1.9, 2.0], abs=1e-12)


def test_a5_reward_on_eos_and_not_after_it() -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    values = torch.zeros(1, 4, dtype=torch.float64)
    on_eos, after_eos = torch.eye(4, dtype=torch.float64)[2:].unsqueeze(1)
    advantages, _ = gae(on_eos, values, mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.9025, 0.95, 1.0, 0.0], abs=1e-12)
    assert advantages.count_nonzero() == mask.sum()

    # The other convention, had it slipped in: a reward one past EOS gives nothing here, as it is outside the mask ...
    assert gae(after_eos, values, mask, 1.0, 0.95)[0].count_nonzero() == 0
    # ... and with a mask that is one too long it gives the known wrong numbers and one advantage too many.
    wrong, _ = gae(after_eos, values, torch.ones_like(mask), 1.0, 0.95)
    assert wrong[0].tolist() == pytest.approx([0.857375, 0.9025, 0.95, 1.0], abs=1e-12)


def test_a6_a_batch_equals_each_row_alone() -> None:
    lengths = [5, 1, 3, 0]
    rewards, values, mask = batch(lengths, 5)
    advantages, returns = gae(rewards, values, mask, 0.99, 0.9)
    for row, length in enumerate(lengths[:3]):
        alone = gae(rewards[row : row + 1, :length], values[row : row + 1, :length], torch.ones(1, length), 0.99, 0.9)
        assert torch.equal(advantages[row, :length], alone[0][0])
        assert torch.equal(returns[row, :length], alone[1][0])


def test_a6_more_pads_change_nothing() -> None:
    rewards, values, mask = batch([4, 2], 9)
    short = gae(rewards[:, :4], values[:, :4], mask[:, :4], 1.0, 0.95)
    for long, expected in zip(gae(rewards, values, mask, 1.0, 0.95), short, strict=True):
        assert torch.equal(long[:, :4], expected)
        assert (long[:, 4:] == 0).all()


@pytest.mark.parametrize("garbage", [1e6, float("inf"), float("nan")])
def test_a7_nothing_outside_the_mask(garbage: float) -> None:
    rewards, values, mask = batch([4, 2, 0], 6)
    clean = gae(rewards, values, mask, 1.0, 0.95)
    dirty = gae(rewards.masked_fill(mask == 0, garbage), values.masked_fill(mask == 0, garbage), mask, 1.0, 0.95)
    for expected, actual in zip(clean, dirty, strict=True):
        assert torch.equal(actual, expected)
        assert (actual[mask == 0] == 0).all()


def test_a7_an_excluded_row_does_not_touch_the_others() -> None:
    rewards, values, mask = batch([4, 0, 2], 6)

    def whitened(rewards: Tensor) -> Tensor:
        advantages, _ = gae(rewards, values, mask, 1.0, 0.95)
        return whiten(advantages, mask, Moments.of(advantages, mask))

    other = rewards.clone()
    other[1] = 1e6
    assert torch.equal(whitened(rewards), whitened(other))


def test_a9_no_bootstrap_past_the_last_token() -> None:
    # Truncated or ended, with room for more tokens or not: the value after the last response token is 0.
    truncated, _ = one_row([0.0, 1.0], [0.4, 0.3], gamma=1.0, lam=1.0)
    assert truncated == pytest.approx([0.6, 0.7], abs=1e-12)
    values_after_eos = torch.tensor([[0.4, 0.3, 50.0]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    ended, _ = gae(rewards, values_after_eos, torch.tensor([[1, 1, 0]]), 1.0, 1.0)
    assert ended[0].tolist() == pytest.approx([0.6, 0.7, 0.0], abs=1e-12)
    bootstrapped, _ = gae(rewards, values_after_eos, torch.ones(1, 3), 1.0, 1.0)
    assert (bootstrapped - ended).abs().max() > 1  # a mask one too long would be noticed


def test_d6_a_value_is_of_the_state_before_its_token() -> None:
    # dA_i / dV_t for the value of the state before token t: -1 at i = t, what is left of it earlier, nothing later.
    gamma, lam, t = 0.9, 0.8, 2
    rewards = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda values: gae(rewards, values, torch.ones(1, 4), gamma, lam)[0],
        torch.zeros(1, 4, dtype=torch.float64),
    )
    assert isinstance(jacobian, Tensor)
    one_step = gamma - gamma * lam
    assert jacobian[0, :, 0, t].tolist() == pytest.approx([gamma * lam * one_step, one_step, -1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_e12_empty_and_full_responses_are_finite(length: int) -> None:
    rewards, values, mask = batch([length], 5)
    for result in gae(rewards, values, mask, 1.0, 0.95):
        assert result.isfinite().all()
        assert result.count_nonzero() == length


SCORES = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
ALL = torch.ones(2, 3, dtype=torch.bool)


def test_baselines_by_hand() -> None:
    """Means 3 and 4; without the reply itself (2 + 6) / 2, (1 + 6) / 2, (1 + 2) / 2."""
    for estimator in ("grpo", "reinforce++-baseline"):
        assert BASELINES[estimator](SCORES, ALL).tolist() == [[3.0] * 3, [4.0] * 3]
    assert BASELINES["rloo"](SCORES, ALL).tolist() == [[4.0, 3.5, 1.5], [4.0] * 3]
    assert BASELINES["reinforce++"](SCORES, ALL).abs().sum() == 0


def test_leave_one_out_is_the_centred_score_scaled() -> None:
    """s_i - mean of the others = (s_i - mean) K / (K - 1), and does not depend on s_i otherwise: unbiased."""
    expected = (SCORES - SCORES.mean(1, keepdim=True)) * 3 / 2
    torch.testing.assert_close(SCORES - BASELINES["rloo"](SCORES, ALL), expected)
    changed = SCORES.clone()
    changed[0, 0] += 10
    assert BASELINES["rloo"](changed, ALL)[0, 0] == BASELINES["rloo"](SCORES, ALL)[0, 0]


def test_deviation_is_that_of_a_sample() -> None:
    np.testing.assert_allclose(deviation(SCORES, ALL, "group")[:, 0], np.std(SCORES.numpy(), axis=1, ddof=1) + 1e-4)
    np.testing.assert_allclose(deviation(SCORES, ALL, "batch"), np.full((2, 3), np.std(SCORES.numpy(), ddof=1) + 1e-4))
    assert same_scores(SCORES, ALL).tolist() == [False, True]


def test_a_reply_without_a_score_is_in_no_baseline() -> None:
    """Of (1, -, 6) the mean is 3.5, the others' are 6 and 1, the deviation 5 / sqrt 2; whatever stands in its place."""
    kept = torch.tensor([[True, False, True], [False, False, True]])
    for absent in (torch.nan, 1e9):
        scores = SCORES.masked_fill(~kept, absent)
        assert BASELINES["grpo"](scores, kept)[0].tolist() == [3.5] * 3
        assert BASELINES["rloo"](scores, kept)[0, ::2].tolist() == [6.0, 1.0]
        assert BASELINES["rloo"](scores, kept)[1, 2] == 4.0  # its own: there is no other
        assert deviation(scores, kept, "group")[0, 0].item() == pytest.approx(5 / 2**0.5 + 1e-4)
        assert deviation(scores, kept, "batch")[0, 0].item() == pytest.approx(np.std([1, 6, 4], ddof=1) + 1e-4)
        assert same_scores(scores, kept).tolist() == [False, True]
    assert same_scores(SCORES, torch.zeros(2, 3, dtype=torch.bool)).tolist() == [True, True]
