"""BLOOM: ALiBi, a norm on the embedding, biases everywhere. Its query_key_value is in our order already, head by head."""

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy

LAYER = "transformer.h.{layer}."

FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    architecture="BloomForCausalLM",
    tensors={
        names.EMBEDDING: Copy("transformer.word_embeddings.weight"),
        names.EMBEDDING_NORM: Copy("transformer.word_embeddings_layernorm.{leaf}"),
        names.INPUT_NORM: Copy(LAYER + "input_layernorm.{leaf}"),
        names.QKV: Copy(LAYER + "self_attention.query_key_value.{leaf}"),
        names.PROJ: Copy(LAYER + "self_attention.dense.{leaf}"),
        names.MLP_NORM: Copy(LAYER + "post_attention_layernorm.{leaf}"),
        names.FC1: Copy(LAYER + "mlp.dense_h_to_4h.{leaf}"),
        names.FC2: Copy(LAYER + "mlp.dense_4h_to_h.{leaf}"),
        names.FINAL_NORM: Copy("transformer.ln_f.{leaf}"),
        names.HEAD: Copy("lm_head.weight"),
    },
    sizes={
        "layers": "n_layer",
        "hidden": "hidden_size",
        "heads": "n_head",
        "vocabulary": "vocab_size",
        "norm_epsilon": "layer_norm_epsilon",
        "tied": "tie_word_embeddings",
    },
    defaults={"tied": True, "norm_epsilon": 1e-5},
    args={"normalization": "LayerNorm", "position_embedding_type": "alibi", "swiglu": False, "add_bias_linear": True},
    optional_prefix="transformer.",
)
