"""A plan's formulas against numbers worked out by hand, and what is counted as alive against tensors one can count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from rlhf.config.engines import Engine
from rlhf.errors import UsageError
from rlhf.rollout.cache import Live as LiveRows
from rlhf.rollout.cache import SlotLayer
from rlhf.runs.launch import engine_of
from rlhf.training.memory import state_bytes
from rlhf.training.plan.live import Live
from rlhf.training.plan.machines import CARDS, bytes_in, card_named, described
from rlhf.training.plan.needs import (
    cache_columns,
    experience_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    sampling_bytes,
    state_needs,
)
from rlhf.training.plan.work import Passed, decoding_seconds, passed

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
WHOLE = {"weights": 800.0, "gradients": 800.0, "optimizer": 1600.0}


def test_adamw_in_float32_takes_sixteen_bytes_a_weight():
    """4 for itself, 4 for its gradient, 4 for each of two moments; a frozen one 4; one that two models share counts once."""
    policy, frozen = nn.Linear(3, 5), nn.Linear(3, 5, bias=False)
    assert state_bytes(policy, frozen) == {"weights": 4 * 20 + 4 * 15, "gradients": 4 * 20, "optimizer": 8 * 20}
    frozen.weight = policy.weight
    assert state_bytes(policy, frozen)["weights"] == 4 * 20
    policy.bias.requires_grad_(False)
    assert state_bytes(policy)["gradients"] == 4 * 15
    assert state_bytes(policy.double())["optimizer"] == 16 * 15


@pytest.mark.parametrize(
    ("engine", "device", "host"),
    [
        (Engine("ddp", 0), {"weights": 800, "gradients": 800, "optimizer": 1600, "exchange": 800}, 0),
        (
            Engine("zero1", 1, bucket=10),
            {"weights": 800, "gradients": 800, "optimizer": 400, "engine's copy": 200, "exchange": 40},
            0,
        ),
        (
            Engine("zero2", 2, bucket=10),
            {"weights": 800, "gradients": 200, "optimizer": 400, "engine's copy": 200, "exchange": 40},
            0,
        ),
        (Engine("zero2", 2, frozenset({"gradients", "optimizer"})), {"weights": 800, "exchange": 0}, 800),
        (
            Engine("zero3", 3, bucket=10),
            {"weights": 200, "gradients": 200, "optimizer": 400, "engine's copy": 200, "exchange": 40},
            0,
        ),
        (Engine("fsdp", 3), {"weights": 200, "gradients": 200, "optimizer": 400}, 0),
    ],
)
def test_what_one_of_four_processes_holds(engine, device, host):
    assert state_needs(WHOLE, 800, engine, 4) == (device, host)


def test_one_process_exchanges_nothing():
    assert state_needs(WHOLE, 800, Engine("ddp", 0), 1) == (WHOLE, 0)


@pytest.mark.parametrize(
    ("launch", "divided", "offloaded"),
    [
        ("ddp", set(), set()),
        ("zero1", {"optimizer"}, set()),
        ("zero2-offload", {"optimizer", "gradients"}, {"optimizer", "gradients"}),
        ("zero3-offload", {"optimizer", "gradients", "weights"}, {"optimizer", "gradients", "weights"}),
        ("fsdp", {"optimizer", "gradients", "weights"}, set()),
    ],
)
def test_what_the_shipped_launch_files_divide(launch, divided, offloaded):
    engine = engine_of(launch)
    assert (engine.divided, engine.offloaded) == (divided, offloaded)
    assert engine.bucket == (500_000_000 if launch.startswith("zero") else 0)  # DeepSpeed's defaults, as the files say nothing
    assert engine.gathers == (1_000_000_000 if launch == "zero3-offload" else 0)


def test_what_a_deepspeed_file_says_of_its_buffers():
    file = {"reduce_bucket_size": 7, "overlap_comm": True, "stage3_max_live_parameters": 11}
    assert Engine.of_deepspeed(2, file).bucket == 14
    assert Engine.of_deepspeed(2, file | {"contiguous_gradients": False}).bucket == 0
    assert Engine.of_deepspeed(3, file)[3:] == (7, 11)


def test_keys_and_values_of_llama_2_7b():
    """Half a MiB a token in two bytes: 2 x 32 layers x 32 heads x 128 x 2."""
    per_token = kv_bytes_per_token(32, 32, 128, 2)
    assert per_token == 2**19
    # 4 rows, 8 + 40 tokens: 8 columns, then 16 more at a time (8, 24, 40), then the last 8 need a third growth to 56
    assert cache_columns(8, 40) == 56
    assert kv_cache_bytes(4, 8, 40, per_token, 32) == 4 * per_token * (56 + 56 / 64)
    assert kv_cache_bytes(4, 100, 1, per_token, 32) == 4 * per_token * 200  # while prompts join


@pytest.mark.parametrize(("prompt", "reply"), [(8, 40), (3, 5), (200, 300), (1, 1)])
def test_columns_are_those_of_a_cache_that_is_filled(prompt, reply):
    live = LiveRows()
    layer = SlotLayer(live, slots=2, longest_reply=reply, window=None)
    layer.join(torch.zeros(2, 1, prompt, 4), torch.zeros(2, 1, prompt, 4))
    live.rows, live.width = 2, prompt
    for _ in range(reply):
        layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
        live.width += 1
    assert layer.keys.shape[2] == cache_columns(prompt, reply)


def test_buffers_of_a_rollout():
    assert sampling_bytes(2, 10, 4) == 2 * 10 * (4 + 4 + 4 + 4 + 8)
    assert experience_bytes(3, 5) == 2 * 15 * (8 * 4 + 16)


def test_flop_are_those_that_torch_counts_without_attentions_own():
    """Eager attention multiplies queries by keys and weights by values: 2 x 2 x heads x tokens^2 x width a layer and row."""
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    model, ids = LlamaForCausalLM(config), torch.arange(22).reshape(2, 11)
    model.get_input_embeddings().requires_grad_(False)
    with FlopCounterMode(display=False) as counted:
        loss = model(ids).logits.sum()
    attention = 2 * 2 * 2 * 32 * 11**2 * 2
    assert counted.get_total_flops() == passed(model).forward(22, 22) + attention
    with FlopCounterMode(display=False) as counted:
        loss.backward()
    assert counted.get_total_flops() == 2 * (passed(model).forward(22, 22) + attention)


def test_six_flop_a_weight_and_token_and_what_changes_that():
    assert Passed(1000, 100, 2.0).training(7, 7) == 6 * 1100 * 7
    assert Passed(1000, 100, 2.0).training(7, 0) == 6 * 1000 * 7
    assert Passed(1000, 100, 2.0, recomputed=True).training(7, 7) == 6 * 1100 * 7 + 2 * 1000 * 7
    assert Passed(1000, 100, 1.0).training(7, 7) == 4 * 1100 * 7  # beneath adapters
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    trunk = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert passed(model) == Passed(trunk, 32 * 40, 2.0, False)
    assert passed(model, frozen_layers=1).backward == 1.0
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert passed(tied) == Passed(trunk, 32 * 40, 2.0, False)
    model.requires_grad_(False)
    assert passed(model).backward == 1.0


def test_a_token_passes_two_of_eight_experts():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=4))
    experts, rest = 3 * 32 * 48, 4 * 32 * 32 + 8 * 32
    assert passed(model).trunk == 2 * (2 * experts + rest)


def test_decoding_waits_for_the_slowest_of_arithmetic_memory_and_kernels():
    """100 replies of 10 tokens, 40 at a time: 3 x 10 steps."""
    sizes = {"flop": 1e6, "weight_bytes": 2e6, "rows": 40, "replies": 100, "reply": 10}
    assert decoding_seconds(**sizes, speed=1e9, bandwidth=1e12, least=0) == pytest.approx(30 * 40e6 / 1e9)
    assert decoding_seconds(**sizes, speed=1e15, bandwidth=1e9, least=0) == pytest.approx(30 * 2e-3)
    assert decoding_seconds(**sizes, speed=1e15, bandwidth=1e12, least=0.5) == pytest.approx(15)


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("512 MB", 512e6), ("1.5tb", 1.5e12)])
def test_amounts_of_memory(text, size):
    assert bytes_in(text, "--gpu-memory") == size


@pytest.mark.parametrize("text", ["80", "80G", "GB", "-1GB", "80 parsecs", "0GB", ""])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UsageError, match="a number and a unit"):
        bytes_in(text, "--gpu-memory")


def test_cards_are_found_by_the_names_that_drivers_give_them():
    assert card_named("NVIDIA H100 80GB HBM3") == ("H100", CARDS["H100"])
    assert card_named("NVIDIA A100-SXM4-80GB") == ("A100", CARDS["A100"])
    assert card_named("NVIDIA GeForce RTX 4090") == ("RTX4090", CARDS["RTX4090"])
    assert card_named("NVIDIA L40S") == ("L40S", CARDS["L40S"])
    assert card_named("Voodoo 2") is None
    assert described("h100", "bf16", fp8=False).flops == 989e12
    assert described("h100", "fp32", fp8=False).flops == 67e12
    assert described("h100", "bf16", fp8=True).flops == 1979e12
    with pytest.raises(UsageError, match="not in the table"):
        described("Voodoo 2", "bf16", fp8=False)


def test_what_is_alive_is_counted():
    """x (8 x 16) @ w (16 x 4): 512 + 256 B of inputs; then a product of 128 B, its square of 128 B, the product is freed."""
    with FakeTensorMode():
        x, w = torch.empty(8, 16), torch.empty(16, 4)
        live = Live(vocabulary=4)
        live.add(x, w)
        live.begin()
        with live:
            product = x @ w
            view = product.t()  # no storage of its own
            square = product * product
            assert (live.now - live.start, live.peak.size, live.peak.logits) == (256, 256, 256)
            del product
            assert live.now - live.start == 256  # the view holds it
            del view
            assert live.now - live.start == 128
            square.add_(1)
        assert live.peak.size == 256


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_backward_needs_is_alive_until_then(kept):
    """Of sigmoid the output is kept for the backward, 400 B; without gradients nothing is, and each gives way to the next."""
    with FakeTensorMode():
        x = torch.empty(100, requires_grad=kept)
        live = Live()
        live.add(x)
        live.begin()
        with live:
            y = x
            for _ in range(5):
                y = torch.sigmoid(y)
    assert live.peak.size == (5 * 400 if kept else 2 * 400)
