"""Mixtral: Mistral with routed experts; w1 is the gate, w3 goes up, w2 comes down."""

from rlhf.checkpoints import names
from rlhf.checkpoints.families.llama import ATTENTION, LAYER, OUTSIDE, ROTARY_RMS_GATED, SIZES
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy, Gated

EXPERT = LAYER + "block_sparse_moe.experts.{expert}."

FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    tensors={
        **OUTSIDE,
        **ATTENTION,
        names.ROUTER: Copy(LAYER + "block_sparse_moe.gate.weight"),
        names.EXPERT_FC1: Gated(EXPERT + "w1.{leaf}", EXPERT + "w3.{leaf}"),
        names.EXPERT_FC2: Copy(EXPERT + "w2.{leaf}"),
    },
    sizes={
        **{name: key for name, key in SIZES.items() if name != "mlp"},
        "expert_mlp": "intermediate_size",
        "experts": "num_local_experts",
        "experts_per_token": "num_experts_per_tok",
    },
    defaults={"tied": False, "rotary_base": 1e6, "norm_epsilon": 1e-5, "experts_per_token": 2},
    constants={"hidden_act": "silu"},
    args={**ROTARY_RMS_GATED, "add_bias_linear": False, "add_qkv_bias": False},
)
