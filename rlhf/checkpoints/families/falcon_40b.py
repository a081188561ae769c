"""Falcon 40B and 180B: attention and MLP side by side, each after a norm of its own; keys and values in groups.

Its query_key_value is in our order already: a group's queries, then its key and value.
"""

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy

LAYER = "transformer.h.{layer}."
SHARED = {
    names.EMBEDDING: Copy("transformer.word_embeddings.weight"),
    names.QKV: Copy(LAYER + "self_attention.query_key_value.{leaf}"),
    names.PROJ: Copy(LAYER + "self_attention.dense.{leaf}"),
    names.FC1: Copy(LAYER + "mlp.dense_h_to_4h.{leaf}"),
    names.FC2: Copy(LAYER + "mlp.dense_4h_to_h.{leaf}"),
    names.FINAL_NORM: Copy("transformer.ln_f.{leaf}"),
    names.HEAD: Copy("lm_head.weight"),
}
SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "mlp": "ffn_hidden_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "norm_epsilon": "layer_norm_epsilon",
    "rotary_base": "rope_theta",
    "tied": "tie_word_embeddings",
}
DEFAULTS = {"tied": True, "norm_epsilon": 1e-5, "rotary_base": 10000.0, "positions": 2048}
ARGS = {"normalization": "LayerNorm", "position_embedding_type": "rope", "swiglu": False}
BIASES = {"bias": (names.QKV, names.PROJ, names.FC1, names.FC2)}

FAMILY = Family(
    name="falcon_40b",
    model_types=("falcon",),
    architecture="FalconForCausalLM",
    tensors={
        **SHARED,
        names.INPUT_NORM: Copy(LAYER + "ln_attn.{leaf}"),
        names.MLP_NORM: Copy(LAYER + "ln_mlp.{leaf}"),
    },
    sizes={**SIZES, "groups": "num_kv_heads"},
    defaults=DEFAULTS,
    constants={"new_decoder_architecture": True, "parallel_attn": True, "bias": False, "alibi": False},
    args=ARGS,
    biases=BIASES,
    when=lambda config: bool(config.get("new_decoder_architecture")),
)
