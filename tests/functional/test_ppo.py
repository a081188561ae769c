"""The losses of PPO: rows A7, C5, D1-D5, D7, D10 and E12."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.masked import token_weights
from rlhf.functional.ppo import explained_variance, policy_loss, value_loss

ONE = torch.ones(1, 1, dtype=torch.float64)


def scalar(x: float) -> Tensor:
    return torch.tensor([[x]], dtype=torch.float64)


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # slope: derivative of the loss by the ratio; where both sides agree (ratio 1) it is that of either
        (0.5, 1.0, -0.5, -1.0),
        (0.5, -1.0, 0.8, 0.0),
        (0.8, 1.0, -0.8, None),
        (0.8, -1.0, 0.8, None),
        (1.0, 1.0, -1.0, -1.0),
        (1.0, -1.0, 1.0, 1.0),
        (1.2, 1.0, -1.2, None),  # at the corner itself any slope between both sides is right
        (1.2, -1.0, 1.2, None),
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.0),
    ],
)
def test_d1_policy_loss(ratio: float, advantage: float, loss: float, slope: float | None) -> None:
    logprobs = scalar(ratio).log().requires_grad_()
    actual, _ = policy_loss(logprobs, scalar(0.0), scalar(advantage), ONE, 0.2)
    assert actual.item() == pytest.approx(loss, abs=1e-12)
    actual.backward()
    if slope is not None:
        assert gradient(logprobs).item() / ratio == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "loss", "slope"), [(-0.5, 1.125, -1.5), (0.0, 0.5, -1.0), (0.1, 0.405, -0.9), (0.5, 0.32, 0.0)]
)
def test_d2_value_loss(value: float, loss: float, slope: float) -> None:
    values = scalar(value).requires_grad_()
    actual, _ = value_loss(values, scalar(0.0), scalar(1.0), ONE, 0.2)
    assert actual.item() == pytest.approx(loss, abs=1e-12)
    actual.backward()
    assert gradient(values).item() == pytest.approx(slope, abs=1e-12)


def test_d2_without_clip_it_is_half_the_squared_error() -> None:
    values = scalar(0.5).requires_grad_()
    actual, stats = value_loss(values, scalar(0.0), scalar(1.0), ONE, None)
    actual.backward()
    assert (actual.item(), gradient(values).item()) == pytest.approx((0.125, -0.5), abs=1e-12)
    assert stats["clip_fraction"] == 0


def test_d2_value_statistics() -> None:
    values = torch.tensor([[0.1, 0.3, -0.5, 9.0]], dtype=torch.float64)
    zeros, ones = torch.zeros_like(values), torch.ones_like(values)
    _, stats = value_loss(values, zeros, ones, torch.tensor([[1, 1, 1, 0]]), 0.2)
    assert stats["clip_fraction"] == 2
    assert stats["error_sq"].item() == pytest.approx(0.81 + 0.49 + 2.25, abs=1e-12)


def first_minibatch(temperature: float = 0.7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits with gradient, tokens, whitened advantages, mask and old log-probs of one policy."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    advantages = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    advantages = (advantages - advantages[mask].mean()) / advantages[mask].std()
    return logits.requires_grad_(), tokens, advantages, mask, token_logprobs(logits, tokens, temperature).detach()


def test_d3_first_minibatch_has_ratio_one() -> None:
    logits, tokens, advantages, mask, old = first_minibatch()
    loss, stats = policy_loss(token_logprobs(logits, tokens, 0.7), old, advantages, mask, 0.2)
    assert stats["max_abs_log_ratio"] == 0
    assert stats["approx_kl"] == 0
    assert stats["clip_fraction"] == 0
    assert stats["ratio"] == mask.sum()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)  # -sum of A, which is whitened


@pytest.mark.parametrize("changes", [[0.02, -0.01, -0.01], [-0.02, 0.01, 0.01]])
def test_d3_a_mismatch_that_cancels_is_still_seen(changes: list[float]) -> None:
    old = torch.full((1, 3), -1.0, dtype=torch.float64)
    new = old + torch.tensor([changes], dtype=torch.float64)
    _, stats = policy_loss(new, old, torch.ones_like(old), torch.ones_like(old), 0.2)
    assert (new - old).mean().item() == pytest.approx(0.0, abs=1e-15)  # what a signed mean would report
    assert stats["max_abs_log_ratio"].item() == pytest.approx(0.02, abs=1e-12)


def test_c5_mixed_temperatures_fail_the_first_minibatch() -> None:
    logits, tokens, advantages, mask, old = first_minibatch(temperature=0.7)
    _, stats = policy_loss(token_logprobs(logits, tokens, 1.0), old, advantages, mask, 0.2)
    assert stats["max_abs_log_ratio"] > 0.1


def test_d3_statistics_are_detached_sums_by_definition() -> None:
    logits, tokens, advantages, mask, old = first_minibatch()
    new = token_logprobs(logits, tokens, 1.0)
    _, stats = policy_loss(new, old, advantages, mask, 0.2)
    delta = (new.detach() - old)[mask].numpy()
    assert stats["approx_kl"].item() == pytest.approx((delta**2).sum() / 2, abs=1e-12)
    assert stats["ratio"].item() == pytest.approx(np.exp(delta).sum(), abs=1e-12)
    assert stats["clip_fraction"].item() == (np.abs(np.exp(delta) - 1) > 0.2).sum() > 0
    assert stats["max_abs_log_ratio"].item() == np.abs(delta).max()
    assert not any(value.requires_grad for value in stats.values())


def test_d4_first_gradient_is_the_plain_policy_gradient() -> None:
    logits, tokens, advantages, mask, old = first_minibatch()
    loss, _ = policy_loss(token_logprobs(logits, tokens, 0.7), old, advantages, mask, 0.2)
    loss.backward()
    # d(-A log pi(token)) / d logits = -A (one_hot - pi) / temperature
    weights = np.exp(logits.detach().numpy() / 0.7)
    pi = weights / weights.sum(axis=-1, keepdims=True)
    weighted = np.where(mask, advantages, 0.0)[..., None]
    expected = -weighted * (np.eye(11)[tokens.numpy()] - pi) / 0.7
    np.testing.assert_allclose(gradient(logits).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("row", [1, 2])
def test_d5_logits_outside_the_response_do_not_matter(row: int) -> None:
    logits, tokens, advantages, mask, old = first_minibatch()
    length = int(mask[row].sum())
    for position in (length - 1, length):
        corrupted = logits.detach().clone()
        corrupted[row, position] += torch.arange(11)
        loss, _ = policy_loss(token_logprobs(corrupted, tokens, 0.7), old, advantages, mask, 0.2)
        clean, _ = policy_loss(token_logprobs(logits, tokens, 0.7), old, advantages, mask, 0.2)
        assert (loss != clean).item() is (position < length)


@pytest.mark.parametrize("garbage", [1e6, -1e6, float("inf"), float("nan")])
def test_a7_masked_positions_change_no_loss_gradient_or_metric(garbage: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(5) < torch.tensor([[5], [0], [3]])
    new, old, third = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)

    def outcome(fill: float) -> list[Tensor]:
        results: list[Tensor] = []
        for loss_of in (policy_loss, value_loss):
            leaf = new.masked_fill(~mask, fill).requires_grad_()
            loss, stats = loss_of(leaf, old.masked_fill(~mask, fill), third.masked_fill(~mask, fill), mask, 0.2)
            loss.backward()
            results += [loss.detach(), gradient(leaf), *stats.values()]
        results.append(explained_variance(new.masked_fill(~mask, fill), old.masked_fill(~mask, fill), mask))
        return results

    for clean, dirty in zip(outcome(0.0), outcome(garbage), strict=True):
        assert torch.equal(clean, dirty)


def test_a7_masking_after_exp_would_give_a_nan_gradient() -> None:
    leaf = torch.tensor([0.0, 1e6], requires_grad=True)
    torch.where(torch.tensor([True, False]), leaf.exp(), 0.0).sum().backward()
    assert gradient(leaf)[1].isnan()


def test_d7_sums_divided_once_are_the_token_mean() -> None:
    # Lengths 1 and 3, advantages +1 and -1, ratio 1.
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    advantages = torch.tensor([[1.0] * 3, [-1.0] * 3], dtype=torch.float64)
    full, _ = policy_loss(zeros, zeros, advantages, mask, 0.2)
    micro = [policy_loss(zeros[i : i + 1], zeros[i : i + 1], advantages[i : i + 1], mask[i : i + 1], 0.2)[0] for i in range(2)]
    assert (full / mask.sum()).item() == ((micro[0] + micro[1]) / mask.sum()).item() == 0.5
    mean_of_means = sum(loss / tokens for loss, tokens in zip(micro, mask.sum(dim=1), strict=True)) / 2
    assert mean_of_means == 0.0  # the known wrong number


@pytest.mark.parametrize("size", [1, 2, 3])
def test_d7_micro_batches_give_the_same_gradient(size: int) -> None:
    logits, tokens, advantages, mask, old = first_minibatch()
    old = old + 0.3 * torch.sin(torch.arange(15).reshape(3, 5))  # some tokens are clipped
    loss, _ = policy_loss(token_logprobs(logits, tokens, 0.7), old, advantages, mask, 0.2)
    (loss / mask.sum()).backward()
    expected = gradient(logits).clone()
    logits.grad = None
    for start in range(0, 3, size):
        rows = slice(start, start + size)
        new = token_logprobs(logits[rows], tokens[rows], 0.7)
        loss, _ = policy_loss(new, old[rows], advantages[rows], mask[rows], 0.2)
        (loss / mask.sum()).backward()
    torch.testing.assert_close(gradient(logits), expected, rtol=0, atol=1e-12)


def shared_trunk_gradients(vf_coef: float | None) -> tuple[Tensor, Tensor]:
    """Gradients of the trunk and of the value head of a shared trunk; None leaves the value loss out altogether."""
    _, tokens, advantages, mask, old = first_minibatch()
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    trunk = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    lm_head = torch.randn(4, 11, generator=generator, dtype=torch.float64)
    value_head = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = (features @ trunk).tanh()
    loss, _ = policy_loss(token_logprobs(hidden @ lm_head, tokens, 0.7), old, advantages, mask, 0.2)
    if vf_coef is not None:
        values = hidden @ value_head
        loss = loss + vf_coef * value_loss(values, values.detach(), torch.ones_like(values), mask, 0.2)[0]
    loss.backward()
    return gradient(trunk), torch.zeros(4) if value_head.grad is None else value_head.grad


def test_d10_value_weight_zero_is_the_policy_alone() -> None:
    trunk, value_head = shared_trunk_gradients(vf_coef=0.0)
    assert torch.equal(trunk, shared_trunk_gradients(vf_coef=None)[0])
    assert (value_head == 0).all()
    trunk_with_value, value_head = shared_trunk_gradients(vf_coef=0.1)
    assert not torch.equal(trunk, trunk_with_value)
    assert (value_head != 0).all()


@pytest.mark.parametrize("length", [0, 4])
def test_e12_empty_and_full_responses_are_finite(length: int) -> None:
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4).unsqueeze(0) < length
    for loss_of in (policy_loss, value_loss):
        loss, stats = loss_of(x, x + 1, x, mask, 0.2)
        assert loss.isfinite()
        assert all(value.isfinite() for value in stats.values())
        assert (loss == 0).item() is (length == 0)


def test_explained_variance_by_definition() -> None:
    rng = np.random.default_rng(0)
    returns, values, mask = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.random((3, 5)) < 0.6
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    actual = explained_variance(torch.from_numpy(values), torch.from_numpy(returns), torch.from_numpy(mask))
    assert actual.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "returns", "mask", "expected"),
    [
        pytest.param([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1, 1, 1], 1.0, id="perfect"),
        pytest.param([0.5, 0.5, 0.5], [1.0, 2.0, 3.0], [1, 1, 1], 0.0, id="constant critic"),
        pytest.param([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1, 1, 1], -3.0, id="worse than a constant"),
        pytest.param([0.3, 0.2, 0.9], [0.1, 0.1, 0.1], [1, 1, 1], 0.0, id="nothing to explain"),
        pytest.param([0.3, 0.2, 0.9], [0.1, 0.2, 0.3], [0, 0, 0], 0.0, id="no token"),
    ],
)
def test_explained_variance_known_cases(values: list[float], returns: list[float], mask: list[int], expected: float) -> None:
    actual = explained_variance(torch.tensor([values]), torch.tensor([returns]), torch.tensor([mask]))
    assert actual.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "loss", "slope"),
    [
        # clip-higher: only the side above 1 moves
        (1.25, 1.0, {"clip_high": 0.28}, -1.25, -1.0),
        (1.4, 1.0, {"clip_high": 0.28}, -1.28, 0.0),
        (0.5, -1.0, {"clip_high": 0.28}, 0.8, 0.0),
        # dual clip: a bound for negative advantages alone, where plain PPO has none
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0, 0.0),
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0, 1.0),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.2, 0.0),
        (5.0, -1.0, {}, 5.0, 1.0),
    ],
)
def test_clip_variants(ratio: float, advantage: float, settings: dict[str, float], loss: float, slope: float) -> None:
    logprobs = scalar(ratio).log().requires_grad_()
    actual, _ = policy_loss(logprobs, scalar(0.0), scalar(advantage), ONE, 0.2, **settings)  # pyright: ignore
    assert actual.item() == pytest.approx(loss, abs=1e-12)
    actual.backward()
    assert gradient(logprobs).item() / ratio == pytest.approx(slope, abs=1e-12)


def test_one_ratio_for_a_reply() -> None:
    """Ratios (1.1, 1.3) of a reply and 0.9 of another: products 1.43 and 0.9, geometric means sqrt(1.43) and 0.9."""
    new = torch.tensor([[1.1, 1.3], [0.9, 1.0]], dtype=torch.float64).log()
    new[1, 1] = 7.0  # a pad, whatever stands there
    mask, advantages = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    weights = token_weights(mask, "replies", 2, torch.float64)
    for ratio_of, first in (("reply", 1.2), ("reply_mean", math.sqrt(1.43))):  # 1.43 is beyond the range
        loss, stats = policy_loss(new, torch.zeros_like(new), advantages, mask, 0.2, weights, ratio_of=ratio_of)  # pyright: ignore
        assert loss.item() == pytest.approx((-first + 0.9) / 2, abs=1e-12)
        assert stats["clip_fraction"] == (2 if ratio_of == "reply" else 0)


def test_aggregations_by_hand() -> None:
    """Replies with losses 4 and (1, 1, 1): 7 / 4, (4 + 1) / 2, and with a longest reply of 8, (4 + 3) / 16."""
    losses = torch.tensor([[4.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    for aggregation, mean in (("tokens", 1.75), ("replies", 2.5), ("constant", 7 / 16)):
        weights = token_weights(mask, aggregation, 8, torch.float32)  # pyright: ignore[reportArgumentType]
        assert (weights * losses).sum().item() == pytest.approx(mean)
        assert weights[0, 1:].abs().sum() == 0
    without = token_weights(torch.tensor([[1, 1], [0, 0]]), "replies", 8, torch.float32)
    assert without.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert token_weights(torch.zeros(2, 2), "tokens", 8, torch.float32).abs().sum() == 0
