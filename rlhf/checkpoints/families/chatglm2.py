"""ChatGLM 2 and 3: query, key and value in one block, keys and values in groups; the gate lies over up already."""

from collections.abc import Mapping
from typing import Any

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import BlockQkv, Copy

LAYER = "transformer.encoder.layers.{layer}."


def groups(config: Mapping[str, Any]) -> int | None:
    """As many as it says, or one for each query."""
    return config.get("multi_query_group_num") if config.get("multi_query_attention") else None


FAMILY = Family(
    name="chatglm2",
    model_types=("chatglm",),
    architecture="ChatGLMForConditionalGeneration",
    tensors={
        names.EMBEDDING: Copy("transformer.embedding.word_embeddings.weight"),
        names.INPUT_NORM: Copy(LAYER + "input_layernorm.{leaf}"),
        names.QKV: BlockQkv(LAYER + "self_attention.query_key_value.{leaf}"),
        names.PROJ: Copy(LAYER + "self_attention.dense.{leaf}"),
        names.MLP_NORM: Copy(LAYER + "post_attention_layernorm.{leaf}"),
        names.FC1: Copy(LAYER + "mlp.dense_h_to_4h.{leaf}"),
        names.FC2: Copy(LAYER + "mlp.dense_4h_to_h.{leaf}"),
        names.FINAL_NORM: Copy("transformer.encoder.final_layernorm.{leaf}"),
        names.HEAD: Copy("transformer.output_layer.weight"),
    },
    sizes={
        "layers": "num_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "head_width": "kv_channels",
        "mlp": "ffn_hidden_size",
        "vocabulary": "padded_vocab_size",
        "positions": "seq_length",
        "norm_epsilon": "layernorm_epsilon",
        "tied": "tie_word_embeddings",
    },
    defaults={"tied": False, "norm_epsilon": 1e-5},
    constants={"rmsnorm": True, "add_qkv_bias": True},
    args={"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "add_qkv_bias": True},
    groups=groups,
    as_groups=lambda heads, groups: {"multi_query_attention": groups != heads, "multi_query_group_num": groups},
    when=lambda config: "padded_vocab_size" in config,
    ignored=("transformer.rotary_pos_emb.inv_freq",),
    mapping_only="transformers has no model of it, and its own needs remote code",
)
