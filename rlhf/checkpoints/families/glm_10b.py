"""GLM-10B: two learned embeddings of positions, one in the text and one in the span; query, key and value in one block."""

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import BlockQkv, Copy

LAYER = "glm.transformer.layers.{layer}."

FAMILY = Family(
    name="glm_10b",
    model_types=("glm",),
    architecture="GLMForConditionalGeneration",
    tensors={
        names.EMBEDDING: Copy("glm.word_embeddings.weight"),
        names.POSITIONS: Copy("glm.transformer.position_embeddings.weight"),
        names.BLOCK_POSITIONS: Copy("glm.transformer.block_position_embeddings.weight"),
        names.INPUT_NORM: Copy(LAYER + "input_layernorm.{leaf}"),
        names.QKV: BlockQkv(LAYER + "attention.query_key_value.{leaf}"),
        names.PROJ: Copy(LAYER + "attention.dense.{leaf}"),
        names.MLP_NORM: Copy(LAYER + "post_attention_layernorm.{leaf}"),
        names.FC1: Copy(LAYER + "mlp.dense_h_to_4h.{leaf}"),
        names.FC2: Copy(LAYER + "mlp.dense_4h_to_h.{leaf}"),
        names.FINAL_NORM: Copy("glm.transformer.final_layernorm.{leaf}"),
    },
    sizes={
        "layers": "num_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "vocabulary": "vocab_size",
        "positions": "max_sequence_length",
        "tied": "tie_word_embeddings",
    },
    defaults={"tied": True, "positions": 1024},
    constants={"block_position_encoding": True},
    args={"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False},
    when=lambda config: bool(config.get("block_position_encoding")) or "num_layers" in config,
    mapping_only="transformers has no model of it, and its own needs remote code",
)
