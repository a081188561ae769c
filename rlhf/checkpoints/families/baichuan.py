"""Baichuan 1 and 2: Llama with query, key and value in one block; 7B turns positions (rope), 13B slopes them (ALiBi).

Baichuan 2 normalises the rows of its head when it is used; the stored rows are converted as they are.
"""

from rlhf.checkpoints import names
from rlhf.checkpoints.families.llama import ATTENTION, GATED_MLP, LAYER, OUTSIDE, SIZES
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import BlockQkv

FAMILY = Family(
    name="baichuan",
    model_types=("baichuan",),
    architecture="BaichuanForCausalLM",
    tensors={**OUTSIDE, **ATTENTION, names.QKV: BlockQkv(LAYER + "self_attn.W_pack.{leaf}"), **GATED_MLP},
    sizes={name: key for name, key in SIZES.items() if name not in ("groups", "head_width", "rotary_base")},
    defaults={"tied": False, "norm_epsilon": 1e-6, "positions": 4096},
    constants={"hidden_act": "silu"},
    args={"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "add_qkv_bias": False},
    ignored=(LAYER + "self_attn.rotary_emb.inv_freq",),
    mapping_only="transformers has no model of it, and its own needs remote code",
)
