"""KL estimators and controllers: rows C1-C4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.functional.kl import ESTIMATORS, AdaptiveKl, FixedKl, controller

# Policy q and reference p over three tokens; expectations are sums over q, gradients are those of the logits of q,
# derived with numpy (finite differences for the gradients).
Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
P = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
KL = 0.27488721956224654
PER_TOKEN = {
    "k1": [0.9162907318741551, 0.0, -0.916290731874155],
    "k2": [0.4197943526592374, 0.0, 0.4197943526592373],
    "k3": [0.316290731874155, 0.0, 0.583709268125845],
}
EXPECTATION = {"k1": KL, "k2": 0.29385604686146616, "k3": KL}
REVERSE_KL_GRADIENT = [0.3207017562067982, -0.08246616581275568, -0.23823559028302022]
GRADIENT = {"k1": [0.0, 0.0, 0.0], "k2": REVERSE_KL_GRADIENT, "k3": [0.3, 0.0, -0.3]}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_c1_estimators_and_their_expectation(name: str) -> None:
    per_token = ESTIMATORS[name](Q.log(), P.log())
    assert per_token.tolist() == pytest.approx(PER_TOKEN[name], abs=1e-12)
    assert (Q * per_token).sum().item() == pytest.approx(EXPECTATION[name], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c1_k2_and_k3_are_never_negative(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Log ratios of 1e-9 to 10: the small ones are where exp(-x) - 1 + x would round to below zero.
    sizes = 10 ** (torch.rand(20000, generator=generator, dtype=dtype) * 10 - 9)
    log_ratio = torch.randn(20000, generator=generator, dtype=dtype) * sizes
    zeros = torch.zeros_like(log_ratio)
    assert (ESTIMATORS["k2"](log_ratio, zeros) >= 0).all()
    assert (ESTIMATORS["k3"](log_ratio, zeros) >= 0).all()
    assert (ESTIMATORS["k1"](log_ratio, zeros) < 0).any()
    assert ((-log_ratio).exp() - 1 + log_ratio < 0).any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_c2_same_model_is_exactly_zero(name: str) -> None:
    logprobs = -torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) * 20
    assert (ESTIMATORS[name](logprobs, logprobs.clone()) == 0).all()


def expected_gradient(name: str) -> Tensor:
    """Gradient by the logits of the policy, of an estimator averaged over tokens already drawn from the policy."""
    logits = Q.log().requires_grad_()
    (Q * ESTIMATORS[name](logits.log_softmax(dim=-1), P.log())).sum().backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("name", ESTIMATORS)
def test_c3_gradient_as_a_loss(name: str) -> None:
    assert expected_gradient(name).tolist() == pytest.approx(GRADIENT[name], abs=1e-8)


def test_c3_only_k2_has_the_gradient_of_the_kl_it_estimates() -> None:
    logits = Q.log().requires_grad_()
    policy = logits.log_softmax(dim=-1)
    (policy.exp() * (policy - P.log())).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(expected_gradient("k2"), logits.grad, rtol=0, atol=1e-12)
    for name in ("k1", "k3"):
        assert (expected_gradient(name) - logits.grad).abs().max() > 0.02


@pytest.mark.parametrize(("kl", "expected"), [(12.0, 0.151536), (0.0, 0.14846399999999998), (6.0, 0.15), (6.3, 0.150384)])
def test_c4_adaptive_coefficient(kl: float, expected: float) -> None:
    adaptive = AdaptiveKl(coef=0.15, target=6.0, horizon=10_000)
    adaptive.update(kl, samples=512)
    assert adaptive.coef == pytest.approx(expected, abs=1e-12)


def test_c4_updates_compound_and_resume() -> None:
    adaptive = AdaptiveKl(coef=0.15, target=6.0, horizon=10_000)
    adaptive.update(12.0, samples=512)
    resumed = AdaptiveKl(coef=0.15, target=6.0, horizon=10_000)
    resumed.load_state_dict(adaptive.state_dict())
    for kl in (adaptive, resumed):
        kl.update(12.0, samples=512)
    assert resumed.coef == adaptive.coef == pytest.approx(0.15 * 1.01024**2, abs=1e-12)


def test_c4_fixed_coefficient_stays() -> None:
    fixed = FixedKl(coef=0.05)
    fixed.update(100.0, samples=512)
    assert fixed.coef == 0.05
    resumed = FixedKl(coef=0.1)
    resumed.load_state_dict(fixed.state_dict())
    assert resumed.coef == 0.05


def test_c4_controllers_by_name() -> None:
    assert controller("fixed", 0.05, target=6.0, horizon=10_000) == FixedKl(coef=0.05)
    assert controller("adaptive", 0.05, target=6.0, horizon=10_000) == AdaptiveKl(coef=0.05, target=6.0, horizon=10_000)
