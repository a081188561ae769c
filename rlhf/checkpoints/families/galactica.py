"""Galactica and OPT. Its `final_layer_norm` inside a layer is the norm before the MLP; positions start at row 2.

Models with a projection beside the embedding (OPT 350M) or with norms after attention have other tensors and are refused.
"""

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy, Offset, Qkv

LAYER = "model.decoder.layers.{layer}."

FAMILY = Family(
    name="galactica",
    model_types=("opt",),
    architecture="OPTForCausalLM",
    tensors={
        names.EMBEDDING: Copy("model.decoder.embed_tokens.weight"),
        names.POSITIONS: Offset("model.decoder.embed_positions.weight"),
        names.INPUT_NORM: Copy(LAYER + "self_attn_layer_norm.{leaf}"),
        names.QKV: Qkv(LAYER + "self_attn.q_proj.{leaf}", LAYER + "self_attn.k_proj.{leaf}", LAYER + "self_attn.v_proj.{leaf}"),
        names.PROJ: Copy(LAYER + "self_attn.out_proj.{leaf}"),
        names.MLP_NORM: Copy(LAYER + "final_layer_norm.{leaf}"),
        names.FC1: Copy(LAYER + "fc1.{leaf}"),
        names.FC2: Copy(LAYER + "fc2.{leaf}"),
        names.FINAL_NORM: Copy("model.decoder.final_layer_norm.{leaf}"),
        names.HEAD: Copy("lm_head.weight"),
    },
    sizes={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "mlp": "ffn_dim",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "tied": "tie_word_embeddings",
    },
    defaults={"tied": True},
    constants={"activation_function": "gelu", "do_layer_norm_before": True, "enable_bias": True},
    args={"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False},
    biases={"enable_bias": (names.QKV, names.PROJ, names.FC1, names.FC2)},
    when=lambda config: bool(config.get("do_layer_norm_before", True)),
)
