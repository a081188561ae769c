"""Rows leave and join while others are sampled, and no reply changes by it: expected is each prompt alone, without a cache."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from splitmix import splitmix64
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rlhf.errors import DataError
from rlhf.models.actor_critic import ActorCritic
from rlhf.rollout.cache import SlotCache, cache_for
from rlhf.rollout.engines import NativeEngine, Samples
from rlhf.rollout.sampling import Sampling

SMALL = tiny.LLAMA | {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
GEMMA = SMALL | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL | {"num_key_value_heads": 2}),
    "gemma2": ("gemma2", GEMMA),  # transformers has it attend eagerly
    "gpt-neox": ("gpt_neox", SMALL),
    "bloom": ("bloom", tiny.NATIVE["bloom"][1]),  # ALiBi: columns count
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-window": ("mistral", SMALL | {"sliding_window": 3}),
    "gemma3": ("gemma3_text", GEMMA),
    "falcon-alibi": ("falcon", tiny.ONE_GROUP["falcon-7b"][1] | {"alibi": True}),
    "deepseek-v3": (
        "deepseek_v3",
        SMALL | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
                 "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    ),
    **{f"{name} of checkpoints": settings for name, settings in (tiny.NATIVE | tiny.ONE_GROUP).items()},
}  # fmt: skip
WITH_STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", SMALL | {"layer_types": ["conv", "full_attention"]}),
    "qwen3-next": (
        "qwen3_next",
        SMALL | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_key_head_dim": 8, "head_dim": 8,
                 "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    ),
}  # fmt: skip
PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 2, 3, 11, 5, 4, 3, 9, 8, 7], [4], [2, 3, 4], [9, 9], [12, 13, 14, 15, 16]]
SEEDS = [11, 22, 33, 44, 55, 66, 77]
SAMPLING = Sampling(9, temperature=2.0)
STOP = {1, 5, 6, 10, 17}


def model_of(family: str, **changes: Any) -> nn.Module:
    """Random in float64, with large weights: every token has its own distribution."""
    model_type, settings = (MORE | FAMILIES | WITH_STATES)[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | {"vocab_size": 20} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    return (model if "num_experts_per_tok" in settings else model.double()).eval()  # experts come in float32 and less


def sampled(model: nn.Module, slots: int, prompts=PROMPTS, sampling: Sampling = SAMPLING, stop=STOP, **more: Any) -> Samples:
    engine = NativeEngine(nullcontext, sorted(stop), pad_id=0, slots=slots, **more)
    engine.sync(ActorCritic(actor=model), version=0)
    return engine.generate(prompts, sampling, SEEDS[: len(prompts)])


@torch.no_grad()
def alone(model: nn.Module, prompt: list[int], seed: int, sampling: Sampling = SAMPLING, stop=STOP) -> list[int]:
    """By definition: the first token at which the sum of probabilities exceeds the row's number, from a whole forward pass."""
    reply: list[int] = []
    while len(reply) < sampling.max_new_tokens and not (reply and reply[-1] in stop):
        logits = model(torch.tensor([prompt + reply]), use_cache=False).logits[0, -1].double()
        draw = (splitmix64(seed, len(reply)) >> 11) * 2.0**-53
        reply.append(int(((logits / sampling.temperature).softmax(-1).cumsum(-1) <= draw).sum()))
    return reply


def expected(model: nn.Module) -> list[list[int]]:
    return [alone(model, prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_family_samples_as_if_alone(family):
    model = model_of(family)
    right = expected(model)
    assert isinstance(cache_for(model, slots=1, longest_reply=1), SlotCache)
    assert len({len(reply) for reply in right}) > 2
    samples = sampled(model, slots=3)
    assert samples.responses == right
    assert samples.prompts == PROMPTS
    assert samples.finished == [reply[-1] in STOP for reply in right]


def test_the_number_of_slots_changes_nothing():
    model = model_of("llama")
    whole = sampled(model, slots=1)
    for slots in range(2, len(PROMPTS) + 2):
        samples = sampled(model, slots)
        assert samples.responses == whole.responses
        for logprobs, right in zip(samples.logprobs, whole.logprobs, strict=True):
            assert torch.allclose(torch.tensor(logprobs), torch.tensor(right), atol=1e-6)


def test_the_model_sees_each_token_once_and_no_pad():
    """The last token of a reply is seen by nobody."""
    model, calls = model_of("gpt-neox"), []
    model.register_forward_pre_hook(lambda _, __, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    for slots in (2, 3):
        calls.clear()
        samples = sampled(model, slots)
        tokens = sum(len(prompt) + len(reply) - 1 for prompt, reply in zip(PROMPTS, samples.responses, strict=True))
        assert sum(rows * length for rows, length in calls) == tokens
        assert max(rows for rows, length in calls if length == 1) == slots
    assert (2, 2) in calls  # the two prompts of two tokens, at once


def test_a_prompt_longer_than_all_before_it_joins_late():
    model = model_of("gemma2")
    prompts = [[2, 3], [4, 5], [6, 7, 8] * 8, [9, 8, 7] * 12]
    samples = sampled(model, 2, prompts)
    assert samples.responses == [alone(model, prompt, seed) for prompt, seed in zip(prompts, SEEDS, strict=False)]


def test_replies_longer_than_the_room_kept_free():
    model, sampling = model_of("llama"), Sampling(50, temperature=2.0)
    samples = sampled(model, 3, sampling=sampling, stop={1})
    assert samples.responses == [alone(model, p, s, sampling, {1}) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert max(map(len, samples.responses)) == 50


def test_a_reply_of_one_token():
    model = model_of("llama")
    first = [reply[:1] for reply in expected(model)]
    every_token_stops = sampled(model, 2, stop=range(20))
    assert every_token_stops.responses == first
    assert all(every_token_stops.finished)
    no_room_for_more = sampled(model, 2, sampling=Sampling(1, temperature=2.0))
    assert no_room_for_more.responses == first
    assert no_room_for_more.finished == [reply[0] in STOP for reply in first]


def test_a_model_under_an_adapter():
    model = get_peft_model(model_of("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.double().eval()
    assert sampled(model, 3).responses == expected(model)


def test_autocast_keeps_what_attention_would_have_made_of_it():
    """Casting keys when they are written or when they are read gives the same bits, so the tokens of `generate`."""
    model = copy.deepcopy(model_of("llama")).float()
    prompts = [prompt for prompt in PROMPTS if len(prompt) == 3]
    with torch.autocast("cpu", torch.bfloat16):
        samples = sampled(model, 4, prompts, Sampling(9, temperature=0), stop={})
        right = model.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=9, eos_token_id=None)
        cache = SlotCache(model.config, slots=2, longest_reply=1)
        filled = DynamicCache(config=model.config)
        model(torch.tensor(prompts), past_key_values=filled)
        cache.join(filled, count=2, length=3)
    assert samples.responses == right[:, 3:].tolist()
    assert cache.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("family", WITH_STATES)
def test_a_model_that_keeps_a_state_says_so_and_waits_for_the_batch(family):
    model = model_of(family)
    told: list[str] = []
    samples = sampled(model, 3, note=told.append)
    assert samples.responses == expected(model)
    assert [line.partition(": ")[2].partition(": ")[2] for line in told] == [
        "its layers keep a LinearAttentionLayer, so prompts wait until all replies of a batch have ended"
    ]


def test_a_model_without_a_cache_of_transformers_is_refused():
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 20}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings))
    with pytest.raises(DataError, match=r"MambaForCausalLM: cannot be sampled from; expected .* `past_key_values`"):
        sampled(model, 3)
