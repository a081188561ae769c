"""Which layers get FP8, and what a model is after they came and went."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.config.sections import Fp8
from rlhf.errors import ConfigError
from rlhf.fp8.apply import apply, described, undo
from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.plan import plan, summary
from rlhf.fp8.recipes import GEMMS

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 160}  # fmt: skip
BLOCK = Fp8(recipe="block")


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


def decisions(model, **settings) -> dict[str, tuple[bool, str]]:
    return {one.name: (one.in_fp8, one.reason) for one in plan(model, Fp8(recipe="block", **settings))}


def test_the_layers_of_a_llama():
    found = decisions(llama())
    assert found["lm_head"] == (False, "LM head: logits need high precision")
    assert found["model.embed_tokens"][0] is False
    inside = {name for name, (in_fp8, _) in found.items() if in_fp8}
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
              "mlp.down_proj"]  # fmt: skip
    assert inside == {f"model.layers.{number}.{leaf}" for number in range(3) for leaf in leaves}
    assert summary(plan(llama(), BLOCK)) == "21 of 23 weight matrices; 1 not: embedding; 1 not: LM head"


def test_a_tied_head_and_a_scalar_head_stay():
    tied = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    assert decisions(tied)["lm_head"][0] is False
    scalar = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))
    found = decisions(scalar)
    assert found["score"] == (False, "one output (a value, a reward, a gate): no product for tensor cores")
    assert sum(in_fp8 for in_fp8, _ in found.values()) == 21


def test_dimensions_that_do_not_fit():
    found = decisions(llama(intermediate_size=100))
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        assert found[f"model.layers.1.mlp.{leaf}"] == (False, "a dimension is no multiple of 16")
    assert found["model.layers.1.self_attn.o_proj"][0]


def test_what_the_user_keeps():
    found = decisions(llama(), keep_first=1, keep_last=1, keep=("*.q_proj", "model.layers.1.mlp.down_proj:wgrad"))
    assert found["model.layers.0.mlp.up_proj"] == (False, "fp8.keep_first")
    assert found["model.layers.2.mlp.up_proj"] == (False, "fp8.keep_last")
    assert found["model.layers.1.self_attn.q_proj"] == (False, "fp8.keep")
    assert found["model.layers.1.mlp.down_proj"] == (True, "wgrad in high precision")
    assert found["model.layers.1.mlp.up_proj"] == (True, "")


def test_what_cannot_be_is_said():
    with pytest.raises(
        ConfigError, match=r"fp8\.keep: '\*\.down' matches no layer of LlamaForCausalLM; layers end in .*down_proj"
    ):
        apply(llama(), Fp8(recipe="block", keep=("*.down",)))
    with pytest.raises(ConfigError, match=r"no layer of LlamaForCausalLM can run in FP8 .*fp8\.keep_first"):
        apply(llama(), Fp8(recipe="block", keep_first=3))


def test_parameters_stay_the_same_objects_and_undo_is_plain(tmp_path):
    model = llama(tie_word_embeddings=True)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    ids = torch.randint(0, 160, (2, 9))
    before, expected = dict(model.named_parameters()), model(ids).logits
    names = set(model.state_dict())
    apply(model, BLOCK)
    assert sum(isinstance(module, FP8Linear) for module in model.modules()) == 21
    assert "21 linear layers in FP8, recipe block, backend reference" in described(model)
    after = dict(model.named_parameters())
    assert set(before) == set(after)
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.model.layers[0].self_attn.q_proj.weight.requires_grad
    assert set(model.state_dict()) == names
    assert not torch.equal(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    undo(model)
    assert described(model) == ""
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_with_adapters_the_base_alone_is_in_fp8():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    found = plan(model, BLOCK)
    by_name = {one.name: one for one in found}
    down = by_name["model.layers.0.mlp.down_proj"]
    assert down.in_fp8
    assert down.place.endswith("down_proj.base_layer")
    assert down.reason == "frozen: no wgrad"
    factors = [one for one in found if "lora_" in one.name]
    assert len(factors) == 42
    assert {one.reason for one in factors} == {"LoRA factor: small, and trained"}
    apply(model, BLOCK)
    model(torch.randint(0, 160, (2, 9))).logits.sum().backward()
    layer = model.get_submodule(down.place)
    assert isinstance(layer, FP8Linear)
    assert layer.weight.grad is None
    merged = model.merge_and_unload()
    undo(merged)
    assert described(merged) == ""


def test_a_model_without_nn_linear_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ConfigError, match=r"4 not: not an nn\.Linear"):
        apply(model, BLOCK)


def test_all_products_are_named_in_the_table():
    kept = plan(llama(), Fp8(recipe="block", high_precision=("dgrad",)))
    assert {one.high_precision for one in kept if one.in_fp8} == {frozenset(["dgrad"])}
    assert {one.high_precision for one in kept if not one.in_fp8} == {frozenset(GEMMS)}


def test_a_layer_that_stands_in_two_places_is_one_fp8_layer():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(32, 32))})
    apply(model, Fp8(recipe="block"))
    assert isinstance(model["a"], FP8Linear)
    assert model["b"][0] is model["a"]
    undo(model)
    assert type(model["a"]) is nn.Linear
    assert model["b"][0] is model["a"]
    assert model["a"].weight is shared.weight
