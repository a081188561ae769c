"""What once gave another model without a word: read right, or refused."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rewrite import Change, back, copied, differing, edit, rewrite
from safetensors.torch import load_file, save_file
from tiny import build

from rlhf.checkpoints.convert import Request, To, plan
from rlhf.errors import DataError


def less_one(half: bool = False) -> Change:
    """Norms as layernorm-1p keeps them."""

    def change(content: dict[str, Any]) -> None:
        content["args"].apply_layernorm_1p = True
        for key, tensor in content["model"].items():
            if isinstance(tensor, torch.Tensor) and "norm" in key and key.endswith("weight"):
                tensor = tensor - 1
            if isinstance(tensor, torch.Tensor):
                content["model"][key] = tensor.bfloat16() if half else tensor

    return change


def test_layernorm_1p_is_undone_on_the_norms_of_heads_too(models, tmp_path) -> None:
    assert differing(copied(models, tmp_path, "qwen3", change=less_one())) == []


def test_layernorm_1p_in_bf16_keeps_what_is_finer_than_a_step_near_one(models, tmp_path) -> None:
    megatron = copied(models, tmp_path, "llama", change=less_one(half=True))
    key = "decoder.final_layernorm.weight"
    rewrite(megatron, edit(key, lambda norm: torch.full_like(norm, 0.0030059814453125)))  # exact in bf16; 1.003 is not
    assert back(megatron)["model.norm.weight"].unique().tolist() == [1.0030059814453125]


def test_core_names_without_a_version_are_in_todays_order(models, tmp_path) -> None:
    assert differing(copied(models, tmp_path, "llama", change=lambda content: content.pop("checkpoint_version"))) == []


def test_old_names_without_a_version_are_in_the_oldest_order(models, tmp_path) -> None:
    megatron = copied(models, tmp_path, "gpt2", 1, "legacy", change=lambda content: content.pop("checkpoint_version"))
    assert differing(megatron, family="gpt2") == [
        f"transformer.h.{layer}.attn.c_attn.{leaf}" for layer in range(4) for leaf in ("bias", "weight")
    ]


def with_keys_apart(content: dict[str, Any]) -> None:
    """Legacy Megatron's names for fewer keys than queries: here as many, two on a rank of four."""
    encoder = content["model"]["language_model"]["encoder"]
    for key in [key for key in encoder if "query_key_value" in key]:
        fused = encoder.pop(key)
        if isinstance(fused, torch.Tensor):
            heads = fused.view(2, 3, -1, *fused.shape[1:])
            encoder[key.replace("query_key_value", "query")] = heads[:, 0].flatten(0, 1).clone()
            encoder[key.replace("query_key_value", "key_value")] = heads[:, 1:].flatten(0, 2).clone()


def test_keys_apart_whose_biases_happen_to_be_equal(models, tmp_path) -> None:
    def zero(content: dict[str, Any]) -> None:
        with_keys_apart(content)
        encoder = content["model"]["language_model"]["encoder"]
        for key in [key for key in encoder if key.endswith("key_value.bias")]:
            encoder[key] = torch.zeros_like(encoder[key])

    megatron = copied(models, tmp_path, "starcoder2", 2, "legacy", change=zero)
    assert differing(megatron, family="starcoder2") == [
        f"model.layers.{layer}.self_attn.{part}_proj.bias" for layer in range(4) for part in "kv"
    ]


def test_one_group_on_each_rank_is_not_guessed(models, tmp_path) -> None:
    def silent(content: dict[str, Any]) -> None:
        content["args"].group_query_attention = False

    megatron = copied(models, tmp_path, "falcon-7b", 2, "legacy")
    assert differing(megatron, family="falcon_7b") == []
    rewrite(megatron, silent)
    with pytest.raises(DataError, match=r"key_value\.weight holds one group.*give --config"):
        back(megatron, family="falcon_7b")
    assert differing(megatron, config=tmp_path / "hf") == []


def test_gpt2_as_it_was_first_published(models, tmp_path) -> None:
    """Names without the prefix, and the triangle of ones that old files hold."""
    source = copied(models, tmp_path, "gpt2").with_name("hf")
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(source / "model.safetensors").items()}
    triangles = {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(4)}
    save_file(tensors | triangles, source / "model.safetensors")
    conversion = plan(Request(source, tmp_path / "out", "megatron"))
    assert len(conversion.source.skipped) == 4
    save_file(tensors | {"h.0.attn.surprise": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(DataError, match=r"h\.0\.attn\.surprise: not a tensor"):
        plan(Request(source, tmp_path / "out", "megatron"))


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "qwen3", "starcoder2", "galactica", "falcon_40b", "bloom", "chatglm2"])
def test_a_family_that_the_model_is_not_of(models, tmp_path, family) -> None:
    megatron = copied(models, tmp_path, "llama-gqa")
    few = copied(models, tmp_path / "few", "llama-gqa")
    rewrite(few, lambda content: content.update(args=argparse.Namespace(num_attention_heads=8)))
    for source in (megatron, few):
        with pytest.raises(DataError, match=f"taken for a {family} model, but"):
            plan(Request(source, tmp_path / "out", "hf", family=family))
    shutil.copy(tmp_path / "hf" / "config.json", megatron)
    both: list[tuple[Path, To]] = [(megatron, "hf"), (tmp_path / "hf", "megatron")]
    for source, to in both:
        with pytest.raises(DataError, match=f"--family {family}: .*config.json's model_type 'llama' is of llama"):
            plan(Request(source, tmp_path / "out", to, family=family))
        assert plan(Request(source, tmp_path / "out", to, family="llama"))


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("qwen3", "self_attn.q_norm.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("gpt2", "transformer.ln_f.bias"),
        ("gpt2", "ln_1.bias"),
        ("gpt2", "mlp.c_fc.bias"),
        ("qwen2", "_proj.bias"),
        ("llama-bias-tied", "o_proj.bias"),
        ("bloom", "word_embeddings_layernorm.bias"),
        ("qwen2_moe", "shared_expert_gate.weight"),
        ("falcon-40b", "ln_mlp.bias"),
        ("starcoder2", "k_proj.bias"),
        ("opt", "fc2.bias"),
        ("llama", "post_attention_layernorm.weight"),
    ],
)
def test_a_tensor_missing_from_every_layer(models, tmp_path, name, lost) -> None:
    source = copied(models, tmp_path, name).with_name("hf")
    tensors = load_file(source / "model.safetensors")
    plan(Request(source, tmp_path / "out", "megatron"))
    save_file({key: value for key, value in tensors.items() if not key.endswith(lost)}, source / "model.safetensors")
    with pytest.raises(DataError, match="missing"):
        plan(Request(source, tmp_path / "out", "megatron"))


def test_biases_that_config_json_denies(models, tmp_path) -> None:
    source = copied(models, tmp_path, "llama-bias-tied").with_name("hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(DataError, match=r"linear_proj\.bias is there, config\.json's attention_bias is false"):
        plan(Request(source, tmp_path / "out", "megatron"))


@pytest.mark.parametrize("change", [{"model.layers.9.nothing": "model.safetensors"}, {"model.norm.weight": None}])
def test_an_index_and_its_files(models, tmp_path, change) -> None:
    source = copied(models, tmp_path, "llama").with_name("hf")
    index = source / "model.safetensors.index.json"
    named = dict.fromkeys(load_file(source / "model.safetensors"), "model.safetensors")
    index.write_text(json.dumps({"weight_map": named}))
    plan(Request(source, tmp_path / "out", "megatron"))
    index.write_text(json.dumps({"weight_map": {key: file for key, file in (named | change).items() if file}}))
    with pytest.raises(DataError, match=f"index.json: says {next(iter(change))} is in"):
        plan(Request(source, tmp_path / "out", "megatron"))


def test_a_dropped_head_does_not_make_a_tied_model(models, tmp_path) -> None:
    megatron = copied(models, tmp_path, "llama")
    rewrite(megatron, lambda content: content["model"].pop("output_layer.weight"))
    with pytest.raises(DataError, match=r"head is not tied, and output_layer\.weight is missing"):
        plan(Request(megatron, tmp_path / "out", "hf"))
    rewrite(megatron, lambda content: setattr(content["args"], "untie_embeddings_and_output_weights", False))
    assert plan(Request(megatron, tmp_path / "out", "hf")).config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_bias_linear": True}, "add_bias_linear True, its tensors have no such biases"),
        ({"add_qkv_bias": True}, "add_qkv_bias True, its tensors have no such biases"),
        ({"normalization": "LayerNorm"}, "its args say normalization 'LayerNorm', and one has 'RMSNorm'"),
        ({"position_embedding_type": "learned_absolute"}, "its args say position_embedding_type"),
    ],
)
def test_args_against_the_config_beside(models, tmp_path, change, message) -> None:
    megatron = copied(models, tmp_path, "llama")
    assert differing(megatron, config=tmp_path / "hf") == []
    rewrite(megatron, lambda content: vars(content["args"]).update(change))
    with pytest.raises(DataError, match=message):
        plan(Request(megatron, tmp_path / "out", "hf", config=tmp_path / "hf"))


def test_the_newer_name_of_layernorm_1p(models, tmp_path) -> None:
    """megatron-core 0.16.1 keeps it in args as layernorm_zero_centered_gamma alone."""

    def renamed(content: dict[str, Any]) -> None:
        less_one()(content)
        del content["args"].apply_layernorm_1p
        content["args"].layernorm_zero_centered_gamma = True

    assert differing(copied(models, tmp_path, "qwen3", change=renamed)) == []


@pytest.mark.parametrize(("name", "dtype"), [("self_attn.q_proj", torch.float16), ("mlp.up_proj", torch.float16)])
def test_parts_of_several_types_are_not_rounded_to_one(tmp_path, name, dtype) -> None:
    build("llama-gqa", tmp_path / "hf")
    tensors = load_file(file := tmp_path / "hf" / "model.safetensors")
    tensors[f"model.layers.1.{name}.weight"] = tensors[f"model.layers.1.{name}.weight"].to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.layers\.1\..*they are of several types: .*torch\.float16"):
        plan(Request(tmp_path / "hf", tmp_path / "out", "megatron"))
