"""Llama 1 to 3, CodeLlama, Yi, Mistral: one table. A sliding window (Mistral) is in config.json alone."""

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy, Gated, Qkv

LAYER = "model.layers.{layer}."

OUTSIDE = {
    names.EMBEDDING: Copy("model.embed_tokens.weight"),
    names.FINAL_NORM: Copy("model.norm.{leaf}"),
    names.HEAD: Copy("lm_head.weight"),
}
ATTENTION = {
    names.INPUT_NORM: Copy(LAYER + "input_layernorm.{leaf}"),
    names.QKV: Qkv(LAYER + "self_attn.q_proj.{leaf}", LAYER + "self_attn.k_proj.{leaf}", LAYER + "self_attn.v_proj.{leaf}"),
    names.PROJ: Copy(LAYER + "self_attn.o_proj.{leaf}"),
    names.MLP_NORM: Copy(LAYER + "post_attention_layernorm.{leaf}"),
}
GATED_MLP = {
    names.FC1: Gated(LAYER + "mlp.gate_proj.{leaf}", LAYER + "mlp.up_proj.{leaf}"),
    names.FC2: Copy(LAYER + "mlp.down_proj.{leaf}"),
}
SIZES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "tied": "tie_word_embeddings",
}
BIASES = {"attention_bias": (names.QKV, names.PROJ), "mlp_bias": (names.FC1, names.FC2)}
ROTARY_RMS_GATED = {"normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True}

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "yi"),
    architecture="LlamaForCausalLM",
    tensors={**OUTSIDE, **ATTENTION, **GATED_MLP},
    sizes=SIZES,
    defaults={"tied": False, "rotary_base": 10000.0, "norm_epsilon": 1e-6},
    constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    args={**ROTARY_RMS_GATED, "add_bias_linear": False, "add_qkv_bias": False},
    biases=BIASES,
    ignored=(LAYER + "self_attn.rotary_emb.inv_freq",),
)
