"""Schedules as stated; optimizer state that loses nothing; batches divided without loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf.config.policies import PpoOptimizer
from rlhf.config.sections import Optimizer, Schedule
from rlhf.training.accumulation import micro_batches
from rlhf.training.optimization import open_optimizer, optimizer_tensors, restore_optimizer, schedule_factor


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_g7_schedule(decay, warmup):
    schedule = Schedule(length=100, unit="steps", decay=decay, warmup=warmup, final=0.1)
    factors = [schedule_factor(schedule, i / 100, (i + 1) / 100) for i in range(100)]
    assert max(factors) <= 1 + 1e-12
    assert min(factors) > 0
    assert max(factors) == pytest.approx(1.0)
    assert schedule_factor(schedule, 1.0, 1.0) == pytest.approx(1.0 if decay == "constant" else 0.1)
    if warmup:
        assert factors[:3] == pytest.approx([0.05, 0.1, 0.15])
    rest = factors[int(100 * warmup) :]
    assert rest == sorted(rest, reverse=True)
    if decay == "linear" and not warmup:
        assert factors[50] == pytest.approx(0.1 + 0.9 * 0.5)


def test_optimizer_state_round_trip():
    def run(steps, start=None):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.actor, model.critic = nn.Linear(3, 3), nn.Linear(3, 1)
        optimizer = open_optimizer(model, PpoOptimizer(lr=0.1, critic_lr=0.2))
        if start is not None:
            weights, state = start
            model.load_state_dict(weights)
            restore_optimizer(optimizer, state)
        for step in steps:
            torch.manual_seed(step)
            model.critic(model.actor(torch.randn(5, 3))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {k: v.clone() for k, v in model.state_dict().items()}, {
            k: v.clone() for k, v in optimizer_tensors(optimizer).items()
        }

    whole = run(range(6))
    parts = run(range(3, 6), start=run(range(3)))
    for one, two in zip(whole, parts, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_e13_first_step_of_adam():
    """PyTorch's Adam moves 0.0909 of the learning rate for a gradient of 1e-6 with eps 1e-5."""
    model = nn.Module()
    model.actor = nn.Linear(1, 1, bias=False)
    before = model.actor.weight.item()
    optimizer = open_optimizer(model.double(), Optimizer(lr=1e-5, eps=1e-5))
    model.actor.weight.grad = torch.full((1, 1), 1e-6, dtype=torch.float64)
    optimizer.step()
    assert before - model.actor.weight.item() == pytest.approx(9.0909e-07, rel=1e-3)


@pytest.mark.parametrize(("count", "size", "world"), [(13, 4, 1), (13, 4, 2), (3, 2, 4), (1, 8, 2), (64, 8, 4)])
def test_g8_micro_batches_cover_a_batch_once(count, size, world):
    parts = [micro_batches(range(count), size, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1  # every rank does as many forwards
    counted = [item for part in parts for micro in part if micro.weight for item in micro.items]
    assert sorted(counted) == list(range(count))
    assert all(micro.items for part in parts for micro in part)
