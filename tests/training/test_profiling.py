"""What a profile says of operators whose number, shapes and FLOP are known from elsewhere."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.training.profiling import by_phase, ceiling, flop, operators, phase_seconds, ranged


def profiled(act) -> list:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        act()
    return list(found.events())


def test_phase_part_and_shape_of_each_product():
    x, w = torch.ones(4, 8), torch.ones(8, 16, requires_grad=True)
    optimizer = torch.optim.AdamW([w])

    def act() -> None:
        x @ w.detach()
        with ranged("update"):
            (x @ w).sum().backward()
            optimizer.step()

    found = operators(profiled(act), on_gpu=False)
    products = [(one.phase, one.part, one.product, one.kind) for one in found if one.product]
    assert products == [
        (None, "forward", ((4, 8), (8, 16)), "matrix products"),
        ("update", "forward", ((4, 8), (8, 16)), "matrix products"),
        ("update", "backward", ((8, 4), (4, 16)), "matrix products"),  # the gradient of w alone: x has none
    ]
    assert flop(((4, 8), (8, 16))) == 2 * 4 * 8 * 16
    assert {one.phase for one in found if one.part == "optimizer"} == {"update"}
    assert {one.kind for one in found if one.part == "optimizer"} == {"optimizer"}


@pytest.mark.parametrize("backward", [False, True])
def test_flop_are_those_that_torch_counts(backward):
    """With eager attention, whose products are matrix products like all others."""
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    config._attn_implementation = "eager"
    model, ids = LlamaForCausalLM(config), torch.arange(22).reshape(2, 11)

    def act() -> None:
        loss = model(ids, labels=ids).loss
        if backward:
            loss.backward()

    with FlopCounterMode(display=False) as counted:
        act()
    found = operators(profiled(act), on_gpu=False)
    assert sum(flop(one.product) for one in found if one.product) == counted.get_total_flops() > 0


def test_the_table_has_a_row_for_each_phase_and_its_share_of_the_ceiling():
    a = torch.ones(64, 64)

    def act() -> None:
        for name in ("rollout", "update", "update"):
            with ranged(name):
                a @ a

    events = profiled(act)
    found, seconds = operators(events, on_gpu=False), phase_seconds(events, wall=10.0)
    assert list(seconds) == ["rollout", "update", "outside phases", "step"]
    assert sum(seconds.values()) == pytest.approx(2 * 10.0)
    square = ((64, 64), (64, 64))
    rows = {line[:20].strip(): line.split() for line in by_phase(found, {"update": 2.0, "step": 4.0}, {square: 0.25})}
    giga = f"{2 * 2 * 64**3 / 2.0 / 1e9:.2f}"
    assert rows["update"][1:] == ["2.000", "50.0", "0.00", giga, "0.00", "25.0"]  # two products of a quarter of a second in two
    assert rows["step"][-1] == f"{100 * 3 * 0.25 / 4:.1f}"


def test_measuring_the_ceiling_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    shape = ((2, 3, 4), (2, 4, 5))
    assert ceiling(Counter([shape]), torch.float32, torch.device("cpu"))[shape] > 0
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    assert not torch.equal(before, torch.get_rng_state())
