"""Qwen 3 with routed experts."""

from rlhf.checkpoints import names
from rlhf.checkpoints.families.llama import ATTENTION, BIASES, GATED_MLP, LAYER, OUTSIDE, ROTARY_RMS_GATED, SIZES
from rlhf.checkpoints.families.qwen3 import HEAD_NORMS
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy, Gated

EXPERT = LAYER + "mlp.experts.{expert}."
EXPERTS = {
    names.ROUTER: Copy(LAYER + "mlp.gate.weight"),
    names.EXPERT_FC1: Gated(EXPERT + "gate_proj.{leaf}", EXPERT + "up_proj.{leaf}"),
    names.EXPERT_FC2: Copy(EXPERT + "down_proj.{leaf}"),
}
MOE_SIZES = {
    **SIZES,
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_mlp": "moe_intermediate_size",
    "router_renormalised": "norm_topk_prob",
}

FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    tensors={**OUTSIDE, **ATTENTION, **HEAD_NORMS, **GATED_MLP, **EXPERTS},
    sizes=MOE_SIZES,
    defaults={
        "tied": False,
        "rotary_base": 10000.0,
        "norm_epsilon": 1e-6,
        "experts_per_token": 8,
        "mlp": 6144,
        "router_renormalised": False,
    },
    constants={"hidden_act": "silu", "attention_bias": False},
    args={**ROTARY_RMS_GATED, "add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": True},
    biases={"attention_bias": BIASES["attention_bias"]},
)
