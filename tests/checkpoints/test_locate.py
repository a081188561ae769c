"""A proof that fails says where: the first place in the forward pass that differs, and the tensors of the result used there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NATIVE, ONE_GROUP, build

import rlhf.checkpoints.layouts.write_torch as writer
from rlhf.checkpoints import families, names, operations
from rlhf.checkpoints.convert import Conversion, Request, plan
from rlhf.checkpoints.operations import Copy, Gated
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.errors import CheckFailed


def to_megatron(name: str, home: Path, grid: Grid | None = None) -> None:
    build(name, home / "hf")
    write(plan(Request(home / "hf", home / "megatron", "megatron", grid=grid or Grid())))


def to_hugging_face(home: Path) -> Conversion:
    conversion = plan(Request(home / "megatron", home / "back", "hf"))
    write(conversion)
    return conversion


def said(conversion: Conversion) -> tuple[str, list[str]]:
    """(the place, the tensors) that a failing proof names."""
    with pytest.raises(CheckFailed) as failure:
        verify(conversion)
    found = re.search(r"they part first at (.+), made from (.+)$", str(failure.value))
    assert found, failure.value
    return found[1], found[2].split(", ")


def gate_and_up_swapped(self, ours, heads):
    return list(ours.chunk(2))[::-1]


split_qkv, join_qkv, split_ranks = operations.split_qkv, operations.join_qkv, operations.split_ranks


def key_and_value_swapped(fused, heads):
    query, key, value = split_qkv(fused, heads)
    return query, value, key


def groups_permuted(fused, heads):
    return split_qkv(torch.cat(fused.chunk(heads.groups)[::-1]), heads)


def a_norm_of_ones(self, ours, heads):
    return [torch.ones_like(ours) if re.search(r"post_attention|layers.{layer}.final_layer", self.name) else ours]


ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
MUTATIONS = {
    "gate and up": (
        "llama-gqa",
        (Gated, "split", gate_and_up_swapped),
        f"the output of {MLP}gate_proj, {MLP}up_proj",
        [f"{MLP}gate_proj.weight", f"{MLP}up_proj.weight"],
    ),
    "gate and up of experts": (
        "mixtral",
        (Gated, "split", gate_and_up_swapped),
        "the input of model.layers.1.input_layernorm",
        [f"model.layers.0.block_sparse_moe.{name}.weight" for name in ("gate", "experts.*.w1", "experts.*.w3", "experts.*.w2")],
    ),
    "key and value": (
        "llama-gqa",
        (operations, "split_qkv", key_and_value_swapped),
        f"the output of {ATTENTION}k_proj, {ATTENTION}v_proj",
        [f"{ATTENTION}k_proj.weight", f"{ATTENTION}v_proj.weight"],
    ),
    "key and value, with biases": (
        "opt",
        (operations, "split_qkv", key_and_value_swapped),
        "the output of model.decoder.layers.0.self_attn.k_proj, model.decoder.layers.0.self_attn.v_proj",
        [f"model.decoder.layers.0.self_attn.{part}_proj.{leaf}" for leaf in ("weight", "bias") for part in "kv"],
    ),
    "key and value in one block": (
        "gpt2",
        (operations, "split_qkv", key_and_value_swapped),
        "the input of transformer.h.0.attn.c_proj",
        ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"],
    ),
    "groups": (
        "llama-gqa",
        (operations, "split_qkv", groups_permuted),
        f"the output of {ATTENTION}q_proj, {ATTENTION}k_proj, {ATTENTION}v_proj",
        [f"{ATTENTION}{part}_proj.weight" for part in "qkv"],
    ),
    "an RMSNorm": (
        "llama-gqa",
        (Copy, "split", a_norm_of_ones),
        "the output of model.layers.0.post_attention_layernorm",
        ["model.layers.0.post_attention_layernorm.weight"],
    ),
    "a LayerNorm": (
        "opt",
        (Copy, "split", a_norm_of_ones),
        "the output of model.decoder.layers.0.final_layer_norm",
        ["model.decoder.layers.0.final_layer_norm.weight", "model.decoder.layers.0.final_layer_norm.bias"],
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_conversion_that_is_wrong(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, (owner, function, wrong), place, tensors = MUTATIONS[mutation]
    to_megatron(name, tmp_path)
    assert verify(to_hugging_face(tmp_path)).holds  # the same, unbroken
    (tmp_path / "back").rename(tmp_path / "right")
    monkeypatch.setattr(owner, function, wrong)
    assert said(to_hugging_face(tmp_path)) == (place, tensors)


def test_a_table_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_megatron("llama-gqa", tmp_path)
    table = families.named("llama").tensors
    first, second = table[names.INPUT_NORM], table[names.MLP_NORM]
    monkeypatch.setitem(table, names.INPUT_NORM, second)
    monkeypatch.setitem(table, names.MLP_NORM, first)
    place, tensors = said(to_hugging_face(tmp_path))
    assert place == "the output of model.layers.0.input_layernorm"
    assert tensors == ["model.layers.0.post_attention_layernorm.weight"]


def test_towards_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "join_qkv", lambda q, k, v, heads: join_qkv(q, v, k, heads))
    build("llama-gqa", tmp_path / "hf")
    conversion = plan(Request(tmp_path / "hf", tmp_path / "megatron", "megatron", grid=Grid(2)))
    write(conversion)
    place, tensors = said(conversion)
    assert place == f"the output of {ATTENTION}k_proj, {ATTENTION}v_proj"
    assert tensors == ["model/decoder.layers.0.self_attention.linear_qkv.weight"]


def test_from_megatron_to_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_megatron("llama-gqa", tmp_path)
    monkeypatch.setattr(writer, "split_ranks", lambda ours, ranks, dim, gated=False: split_ranks(ours, ranks, dim))
    conversion = plan(Request(tmp_path / "megatron", tmp_path / "again", "megatron", grid=Grid(2)))
    write(conversion)
    place, tensors = said(conversion)
    assert place.startswith("the output of decoder.layers.0.mlp.linear_fc1")
    assert tensors == ["model/decoder.layers.0.mlp.linear_fc1.weight"]


def test_where_no_tensor_is_wrong_it_says_so(tmp_path: Path) -> None:
    to_megatron("llama-gqa", tmp_path)
    conversion = plan(Request(tmp_path / "megatron", tmp_path / "back", "hf", rotary_base=500.0))
    write(conversion)
    conversion.config["rope_theta"] = 10000.0  # as its source has it
    with pytest.raises(CheckFailed, match=r"the input of model.layers.0.self_attn.o_proj, where no tensor .* config\.json"):
        verify(conversion)


def damaged(directory: Path) -> Iterator[str]:
    """Each tensor of layer 1, and of none, in turn: its name, while it is another. A layer's experts are damaged together, as
    not every token comes to all."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    kinds = {key: re.sub(r"experts\.\d+\.", "experts.*.", key) for key in tensors}
    for kind in dict.fromkeys(kind for kind in kinds.values() if ".1." in kind or not re.search(r"\.\d+\.", kind)):
        others = {key: torch.randn(tensors[key].shape, generator=generator) for key in tensors if kinds[key] == kind}
        save_file({**tensors, **others}, file, {"format": "pt"})
        yield kind


@pytest.mark.slow  # the model once for each of its tensors; what follows is quick
@pytest.mark.parametrize("name", [*NATIVE, *ONE_GROUP])
def test_whichever_tensor_is_damaged_is_named(name: str, tmp_path: Path) -> None:
    to_megatron(name, tmp_path, Grid() if name in ONE_GROUP else Grid(2))
    conversion = to_hugging_face(tmp_path)
    assert verify(conversion).holds
    count = 0
    for key in damaged(tmp_path / "back"):
        if name == "opt" and key.endswith("k_proj.bias"):
            continue  # it adds the same to every score of a query: the model is the same without it
        tensors = said(conversion)[1]
        assert key in tensors
        assert len(tensors) <= 6
        count += 1
    assert count >= 8
