"""ChatGLM-6B: rotary positions in two dimensions. Its query_key_value is in our order already, head by head."""

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy

LAYER = "transformer.layers.{layer}."

FAMILY = Family(
    name="chatglm_6b",
    model_types=("chatglm",),
    architecture="ChatGLMModel",
    tensors={
        names.EMBEDDING: Copy("transformer.word_embeddings.weight"),
        names.INPUT_NORM: Copy(LAYER + "input_layernorm.{leaf}"),
        names.QKV: Copy(LAYER + "attention.query_key_value.{leaf}"),
        names.PROJ: Copy(LAYER + "attention.dense.{leaf}"),
        names.MLP_NORM: Copy(LAYER + "post_attention_layernorm.{leaf}"),
        names.FC1: Copy(LAYER + "mlp.dense_h_to_4h.{leaf}"),
        names.FC2: Copy(LAYER + "mlp.dense_4h_to_h.{leaf}"),
        names.FINAL_NORM: Copy("transformer.final_layernorm.{leaf}"),
        names.HEAD: Copy("lm_head.weight"),
    },
    sizes={
        "layers": "num_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "mlp": "inner_hidden_size",
        "vocabulary": "vocab_size",
        "positions": "max_sequence_length",
        "norm_epsilon": "layernorm_epsilon",
    },
    defaults={"norm_epsilon": 1e-5},
    constants={"position_encoding_2d": True},
    args={"normalization": "LayerNorm", "swiglu": False},
    when=lambda config: "num_layers" in config and "padded_vocab_size" not in config,
    ignored=(LAYER + "attention.rotary_emb.inv_freq",),
    mapping_only="transformers has no model of it, and its own needs remote code",
)
