"""Families transformers has no model of: tensors of the shapes their own code gives them, there and back, equal to the bit.

The order of rows is checked by hand on one layer of each: where our fused matrix puts a row of theirs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.hugging_face import read_hugging_face
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.errors import CheckFailed

H, F, V, WIDTH, HEADS = 64, 96, 100, 16, 4


def layers(prefix: str, tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{layer}.{name}": shape for layer in (0, 1) for name, shape in tensors.items()}


def norm(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{leaf}": (H,) for name in names for leaf in ("weight", "bias")}


def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


FAMILIES = {
    "qwen": (
        {"model_type": "qwen", "num_hidden_layers": 2, "num_attention_heads": HEADS, "kv_channels": WIDTH, "vocab_size": V},
        {"transformer.wte.weight": (V, H), "transformer.ln_f.weight": (H,), "lm_head.weight": (V, H)}
        | layers(
            "transformer.h.",
            {"ln_1.weight": (H,), "ln_2.weight": (H,)}
            | linear("attn.c_attn", 3 * H, H)
            | linear("attn.c_proj", H, H, bias=False)
            | linear("mlp.w1", F, H, bias=False)
            | linear("mlp.w2", F, H, bias=False)
            | linear("mlp.c_proj", H, F, bias=False),
        ),
    ),
    "baichuan": (
        {
            "model_type": "baichuan",
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "vocab_size": V,
            "intermediate_size": F,
        },
        {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,), "lm_head.weight": (V, H)}
        | layers(
            "model.layers.",
            {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
            | linear("self_attn.W_pack", 3 * H, H, bias=False)
            | linear("self_attn.o_proj", H, H, bias=False)
            | linear("mlp.gate_proj", F, H, bias=False)
            | linear("mlp.up_proj", F, H, bias=False)
            | linear("mlp.down_proj", H, F, bias=False),
        ),
    ),
    "chatglm_6b": (
        {"model_type": "chatglm", "num_layers": 2, "num_attention_heads": HEADS, "vocab_size": V, "inner_hidden_size": F},
        {"transformer.word_embeddings.weight": (V, H), "lm_head.weight": (V, H)}
        | norm("transformer.final_layernorm")
        | layers(
            "transformer.layers.",
            norm("input_layernorm", "post_attention_layernorm")
            | linear("attention.query_key_value", 3 * H, H)
            | linear("attention.dense", H, H)
            | linear("mlp.dense_h_to_4h", F, H)
            | linear("mlp.dense_4h_to_h", H, F),
        ),
    ),
    "chatglm2": (
        {
            "model_type": "chatglm",
            "num_layers": 2,
            "num_attention_heads": HEADS,
            "padded_vocab_size": V,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "kv_channels": WIDTH,
            "ffn_hidden_size": F,
        },
        {
            "transformer.embedding.word_embeddings.weight": (V, H),
            "transformer.encoder.final_layernorm.weight": (H,),
            "transformer.output_layer.weight": (V, H),
        }
        | layers(
            "transformer.encoder.layers.",
            {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
            | linear("self_attention.query_key_value", (HEADS + 4) * WIDTH, H)
            | linear("self_attention.dense", H, H, bias=False)
            | linear("mlp.dense_h_to_4h", 2 * F, H, bias=False)
            | linear("mlp.dense_4h_to_h", H, F, bias=False),
        ),
    ),
    "glm_10b": (
        {"model_type": "glm", "num_layers": 2, "num_attention_heads": HEADS, "vocab_size": V, "block_position_encoding": True},
        {
            "glm.word_embeddings.weight": (V, H),
            "glm.transformer.position_embeddings.weight": (33, H),
            "glm.transformer.block_position_embeddings.weight": (33, H),
        }
        | norm("glm.transformer.final_layernorm")
        | layers(
            "glm.transformer.layers.",
            norm("input_layernorm", "post_attention_layernorm")
            | linear("attention.query_key_value", 3 * H, H)
            | linear("attention.dense", H, H)
            | linear("mlp.dense_h_to_4h", 4 * H, H)
            | linear("mlp.dense_4h_to_h", H, 4 * H),
        ),
    ),
}


def build(name: str, directory: Path) -> dict[str, torch.Tensor]:
    config, shapes = FAMILIES[name]
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | {"hidden_size": H}))
    return tensors


@pytest.mark.parametrize("grid", [Grid(), Grid(2, 2), Grid(2, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, grid: Grid, tmp_path: Path) -> None:
    tensors = build(name, tmp_path / "hf")
    conversion = plan(Request(tmp_path / "hf", tmp_path / "megatron", "megatron", grid=grid))
    assert conversion.family is not None
    assert conversion.family.name == name
    write(conversion)
    with pytest.raises(CheckFailed, match=f"{name}: tensor mapping only"):
        verify(conversion)
    write(plan(Request(tmp_path / "megatron", tmp_path / "back", "hf")))
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "hf" / "config.json").read_text()
    )


@pytest.mark.parametrize(
    ("name", "key", "groups"),
    [
        ("qwen", "transformer.h.1.attn.c_attn.weight", 4),
        ("baichuan", "model.layers.1.self_attn.W_pack.weight", 4),
        ("chatglm2", "transformer.encoder.layers.1.self_attention.query_key_value.weight", 2),
        ("glm_10b", "glm.transformer.layers.1.attention.query_key_value.weight", 4),
    ],
)
def test_rows_of_a_block_by_hand(name: str, key: str, groups: int, tmp_path: Path) -> None:
    """[all queries; all keys; all values] becomes, group by group: its queries, its key, its value."""
    block = build(name, tmp_path / "hf")[key]
    ours = read_hugging_face(tmp_path / "hf").tensors["decoder.layers.1.self_attention.linear_qkv.weight"].read()
    per = HEADS // groups
    row = 0
    for group in range(groups):
        for part in (
            *(block[(group * per + head) * WIDTH :][:WIDTH] for head in range(per)),
            block[(HEADS + group) * WIDTH :][:WIDTH],
            block[(HEADS + groups + group) * WIDTH :][:WIDTH],
        ):
            assert torch.equal(ours[row : row + WIDTH], part)
            row += WIDTH
    assert row == ours.shape[0]


def test_the_gate_of_qwen_is_w2(tmp_path: Path) -> None:
    tensors = build("qwen", tmp_path / "hf")
    ours = read_hugging_face(tmp_path / "hf").tensors["decoder.layers.0.mlp.linear_fc1.weight"].read()
    assert torch.equal(ours[:F], tensors["transformer.h.0.mlp.w2.weight"])
    assert torch.equal(ours[F:], tensors["transformer.h.0.mlp.w1.weight"])
