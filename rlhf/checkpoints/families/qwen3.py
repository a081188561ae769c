"""Qwen 3: Llama with a norm on every head's query and key."""

from rlhf.checkpoints import names
from rlhf.checkpoints.families.llama import ATTENTION, BIASES, GATED_MLP, LAYER, OUTSIDE, ROTARY_RMS_GATED, SIZES
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy

HEAD_NORMS = {
    names.QUERY_NORM: Copy(LAYER + "self_attn.q_norm.weight"),
    names.KEY_NORM: Copy(LAYER + "self_attn.k_norm.weight"),
}

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    tensors={**OUTSIDE, **ATTENTION, **HEAD_NORMS, **GATED_MLP},
    sizes=SIZES,
    defaults={"tied": False, "rotary_base": 10000.0, "norm_epsilon": 1e-6, "head_width": 128},
    constants={"hidden_act": "silu", "attention_bias": False},
    args={**ROTARY_RMS_GATED, "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": True},
    biases={"attention_bias": BIASES["attention_bias"]},
)
