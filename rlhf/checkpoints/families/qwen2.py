"""Qwen 1.5, 2 and 2.5: Llama with biases on query, key and value; small ones have tied heads."""

from rlhf.checkpoints.families.llama import ATTENTION, GATED_MLP, OUTSIDE, ROTARY_RMS_GATED, SIZES
from rlhf.checkpoints.family import Family

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    tensors={**OUTSIDE, **ATTENTION, **GATED_MLP},
    sizes={name: key for name, key in SIZES.items() if name != "head_width"},
    defaults={"tied": False, "rotary_base": 10000.0, "norm_epsilon": 1e-6},
    constants={"hidden_act": "silu"},
    args={**ROTARY_RMS_GATED, "add_bias_linear": False, "add_qkv_bias": True, "qk_layernorm": False},
)
