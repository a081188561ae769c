"""Qwen 1: query, key and value in one block; w2 is the gate and w1 goes up; its intermediate_size counts both."""

from rlhf.checkpoints import names
from rlhf.checkpoints.families.llama import ROTARY_RMS_GATED
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import BlockQkv, Copy, Gated

LAYER = "transformer.h.{layer}."

FAMILY = Family(
    name="qwen",
    model_types=("qwen",),
    architecture="QWenLMHeadModel",
    tensors={
        names.EMBEDDING: Copy("transformer.wte.weight"),
        names.INPUT_NORM: Copy(LAYER + "ln_1.{leaf}"),
        names.QKV: BlockQkv(LAYER + "attn.c_attn.{leaf}"),
        names.PROJ: Copy(LAYER + "attn.c_proj.{leaf}"),
        names.MLP_NORM: Copy(LAYER + "ln_2.{leaf}"),
        names.FC1: Gated(LAYER + "mlp.w2.{leaf}", LAYER + "mlp.w1.{leaf}"),
        names.FC2: Copy(LAYER + "mlp.c_proj.{leaf}"),
        names.FINAL_NORM: Copy("transformer.ln_f.{leaf}"),
        names.HEAD: Copy("lm_head.weight"),
    },
    sizes={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "head_width": "kv_channels",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "norm_epsilon": "layer_norm_epsilon",
        "rotary_base": "rotary_emb_base",
        "tied": "tie_word_embeddings",
    },
    defaults={"tied": False, "rotary_base": 10000.0, "norm_epsilon": 1e-6},
    constants={"no_bias": True},
    args={**ROTARY_RMS_GATED, "add_bias_linear": False, "add_qkv_bias": True},
    ignored=("transformer.rotary_emb.inv_freq",),
    mapping_only="transformers has no model of it, and its own needs remote code",
)
