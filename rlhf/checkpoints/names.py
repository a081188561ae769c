"""What the tools call each tensor, and the one name it has here.

Our names are those of Megatron-core's local layers with global numbers: `decoder.layers.{layer}.mlp.linear_fc1.{leaf}`. A style
says what another writer calls some of them; what it does not list, it calls as we do. A new style is a new table.
"""

from __future__ import annotations

import re
from functools import cache

from rlhf.checkpoints.operations import Copy, Gated, Operation, Qkv, QueryAndKeyValue
from rlhf.checkpoints.templates import Values, match

LAYER = "decoder.layers.{layer}."
EMBEDDING = "embedding.word_embeddings.weight"
EMBEDDING_NORM = "embedding.norm.{leaf}"
POSITIONS = "embedding.position_embeddings.weight"
BLOCK_POSITIONS = "embedding.block_position_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.{leaf}"
QKV = LAYER + "self_attention.linear_qkv.{leaf}"
QUERY_NORM = LAYER + "self_attention.q_layernorm.weight"
KEY_NORM = LAYER + "self_attention.k_layernorm.weight"
PROJ = LAYER + "self_attention.linear_proj.{leaf}"
INPUT_NORM = LAYER + "input_layernorm.{leaf}"
MLP_NORM = LAYER + "pre_mlp_layernorm.{leaf}"
FC1 = LAYER + "mlp.linear_fc1.{leaf}"
FC2 = LAYER + "mlp.linear_fc2.{leaf}"
ROUTER = LAYER + "mlp.router.weight"
EXPERT_FC1 = LAYER + "mlp.experts.{expert}.linear_fc1.{leaf}"
EXPERT_FC2 = LAYER + "mlp.experts.{expert}.linear_fc2.{leaf}"
SHARED_FC1 = LAYER + "mlp.shared_experts.linear_fc1.{leaf}"
SHARED_FC2 = LAYER + "mlp.shared_experts.linear_fc2.{leaf}"
SHARED_GATE = LAYER + "mlp.shared_experts.gate_weight"

NAMES = (
    EMBEDDING,
    POSITIONS,
    BLOCK_POSITIONS,
    EMBEDDING_NORM,
    INPUT_NORM,
    QKV,
    QUERY_NORM,
    KEY_NORM,
    PROJ,
    MLP_NORM,
    FC1,
    FC2,
    ROUTER,
    LAYER + "mlp.router.expert_bias",
    EXPERT_FC1,
    EXPERT_FC2,
    SHARED_FC1,
    SHARED_FC2,
    SHARED_GATE,
    FINAL_NORM,
    HEAD,
)
"""All of them, in the order a model uses them."""

_ENCODER = "encoder.layers.{layer}."
_LOCAL = {
    EXPERT_FC1: LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.{leaf}",
    EXPERT_FC2: LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.{leaf}",
}
_TRANSFORMER_ENGINE = {
    INPUT_NORM: LAYER + "self_attention.linear_qkv.layer_norm_{leaf}",
    MLP_NORM: LAYER + "mlp.linear_fc1.layer_norm_{leaf}",
    EXPERT_FC1: LAYER + "mlp.experts.linear_fc1.{leaf}{expert}",
    EXPERT_FC2: LAYER + "mlp.experts.linear_fc2.{leaf}{expert}",
}
_LEGACY = {
    EMBEDDING_NORM: "embedding.word_embeddings.norm.{leaf}",
    INPUT_NORM: _ENCODER + "input_norm.{leaf}",
    QKV: _ENCODER + "self_attention.query_key_value.{leaf}",
    PROJ: _ENCODER + "self_attention.dense.{leaf}",
    MLP_NORM: _ENCODER + "post_attention_norm.{leaf}",
    FC1: _ENCODER + "mlp.dense_h_to_4h.{leaf}",
    FC2: _ENCODER + "mlp.dense_4h_to_h.{leaf}",
    FINAL_NORM: "encoder.final_norm.{leaf}",
}
_TRANSFORMER_LAYER = {
    **_LEGACY,
    INPUT_NORM: _ENCODER + "self_attention.layernorm_qkv.layer_norm_{leaf}",
    QKV: _ENCODER + "self_attention.layernorm_qkv.{leaf}",
    PROJ: _ENCODER + "self_attention.proj.{leaf}",
    MLP_NORM: _ENCODER + "layernorm_mlp.layer_norm_{leaf}",
    FC1: _ENCODER + "layernorm_mlp.fc1_{leaf}",
    FC2: _ENCODER + "layernorm_mlp.fc2_{leaf}",
    FINAL_NORM: "encoder.final_layernorm.{leaf}",
}

STYLES: dict[str, dict[str, str]] = {
    "local": _LOCAL,
    "transformer-engine": _TRANSFORMER_ENGINE,
    "legacy": _LEGACY,
    "transformer-layer": _TRANSFORMER_LAYER,
}
"""Megatron-core with its own layers; with Transformer Engine's fused ones; Megatron-LM before core (names from 2023-10 on); and
Transformer Engine's whole TransformerLayer."""

_ALSO_READ: tuple[tuple[str, Operation], ...] = (
    (INPUT_NORM, Copy(_ENCODER + "input_layernorm.{leaf}")),
    (MLP_NORM, Copy(_ENCODER + "post_attention_layernorm.{leaf}")),
    (QKV, Copy(_ENCODER + "attention.query_key_value.{leaf}")),
    (PROJ, Copy(_ENCODER + "attention.dense.{leaf}")),
    (QKV, QueryAndKeyValue(_ENCODER + "self_attention.query.{leaf}", _ENCODER + "self_attention.key_value.{leaf}")),
    (
        QKV,
        Qkv(
            _ENCODER + "self_attention.layernorm_qkv.query_{leaf}",
            _ENCODER + "self_attention.layernorm_qkv.key_{leaf}",
            _ENCODER + "self_attention.layernorm_qkv.value_{leaf}",
        ),
    ),
    (FC1, Gated(_ENCODER + "mlp.dense_h_to_4h_1.{leaf}", _ENCODER + "mlp.dense_h_to_4h_2.{leaf}")),
)
"""Names found in files that we do not write: Megatron-LM before 2023-10, Pai's, and layers with their parts kept apart."""

COPIES = {"word_embeddings_for_head.weight": EMBEDDING, "lm_head.weight": HEAD}
"""What some writers leave beside the tensor it is equal to: Megatron-LM on the last stage, Pai's converters on both."""

NO_WEIGHTS = re.compile(r"(^|\.)(_extra_state|rotary_emb\.inv_freq|masked_bias|rotary_pos_emb\.inv_freq)$")
"""State of a layer that can be made again."""

EVERY_RANK_HAS_THE_SAME: frozenset[str] = frozenset(
    {
        INPUT_NORM,
        MLP_NORM,
        FINAL_NORM,
        POSITIONS,
        BLOCK_POSITIONS,
        EMBEDDING_NORM,
        QUERY_NORM,
        KEY_NORM,
        ROUTER,
        LAYER + "mlp.router.expert_bias",
        SHARED_GATE,
    }
)
_SPLIT_BY_COLUMN = {PROJ, FC2, EXPERT_FC2, SHARED_FC2}
GATED_PAIRS = {FC1: FC2, EXPERT_FC1: EXPERT_FC2, SHARED_FC1: SHARED_FC2}
"""The first matrix of an MLP and its second; the first holds two matrices where it has twice the rows the second takes in."""


def split_dimension(piece: str, leaf: str | None) -> int | None:
    """The dimension that tensor parallelism divides; None where every rank holds all of it."""
    if piece in EVERY_RANK_HAS_THE_SAME:
        return None
    if piece in _SPLIT_BY_COLUMN:
        return None if leaf == "bias" else 1
    return 0


def is_gated(piece: str, fc1: tuple[int, ...], fc2: tuple[int, ...] | None) -> bool:
    """Whether the first matrix of an MLP holds two, from its shape and that of the second."""
    return piece in GATED_PAIRS and fc2 is not None and fc1[0] == 2 * fc2[1]


@cache
def megatron_table() -> tuple[tuple[str, Operation], ...]:
    """(our name, what makes it) of every Megatron style, for reading."""
    rows: dict[tuple[str, Operation], None] = {(ours, Copy(ours)): None for ours in NAMES}
    for style in STYLES.values():
        rows |= {(ours, Copy(theirs)): None for ours, theirs in style.items()}
    return tuple(rows | dict.fromkeys(_ALSO_READ))


def template_of(name: str) -> tuple[str, Values]:
    """(the template of NAMES that our name fits, what is in its holes)"""
    for template in NAMES:
        values = match(template, name)
        if values is not None:
            return template, values
    raise KeyError(name)


def modern(key: str) -> str:
    """A key without the prefixes that differ from writer to writer and say nothing."""
    key = key.removeprefix("module.").removeprefix("language_model.")
    return re.sub(r"^transformer\.(layers|final_layernorm)\b", r"encoder.\1", key)


def written_names(style: str) -> dict[str, str]:
    """Our name -> the style's, for every one of ours."""
    return {ours: STYLES[style].get(ours, ours) for ours in NAMES}
