"""Qwen 1.5 and 2 with routed experts and one that all tokens share, under a gate of its own."""

from rlhf.checkpoints import names
from rlhf.checkpoints.families.llama import ATTENTION, GATED_MLP, LAYER, OUTSIDE, ROTARY_RMS_GATED
from rlhf.checkpoints.families.qwen3_moe import EXPERTS, MOE_SIZES
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy, Gated

SHARED = LAYER + "mlp.shared_expert."

FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architecture="Qwen2MoeForCausalLM",
    tensors={
        **OUTSIDE,
        **ATTENTION,
        **GATED_MLP,
        **EXPERTS,
        names.SHARED_FC1: Gated(SHARED + "gate_proj.{leaf}", SHARED + "up_proj.{leaf}"),
        names.SHARED_FC2: Copy(SHARED + "down_proj.{leaf}"),
        names.SHARED_GATE: Copy(LAYER + "mlp.shared_expert_gate.weight"),
    },
    sizes={
        **{name: key for name, key in MOE_SIZES.items() if name != "head_width"},
        "shared_mlp": "shared_expert_intermediate_size",
    },
    defaults={
        "tied": False,
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-6,
        "experts_per_token": 4,
        "mlp": 5632,
        "router_renormalised": False,
    },
    constants={"hidden_act": "silu"},
    args={**ROTARY_RMS_GATED, "add_bias_linear": False, "add_qkv_bias": True, "qk_layernorm": False},
)
