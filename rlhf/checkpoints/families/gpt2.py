"""GPT-2: matrices stored (in, out); query, key and value in one block."""

from rlhf.checkpoints import names
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import BlockQkv, Copy, Transposed

LAYER = "transformer.h.{layer}."
OUTSIDE = {
    names.EMBEDDING: Copy("transformer.wte.weight"),
    names.POSITIONS: Copy("transformer.wpe.weight"),
    names.FINAL_NORM: Copy("transformer.ln_f.{leaf}"),
    names.HEAD: Copy("lm_head.weight"),
}
NORMS = {names.INPUT_NORM: Copy(LAYER + "ln_1.{leaf}"), names.MLP_NORM: Copy(LAYER + "ln_2.{leaf}")}
SIZES = {
    "layers": "n_layer",
    "hidden": "n_embd",
    "heads": "n_head",
    "mlp": "n_inner",
    "vocabulary": "vocab_size",
    "positions": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}
LEARNED_POSITIONS = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "swiglu": False,
    "add_bias_linear": True,
}

FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    tensors={
        **OUTSIDE,
        **NORMS,
        names.QKV: BlockQkv(LAYER + "attn.c_attn.{leaf}", transposed=True),
        names.PROJ: Transposed(LAYER + "attn.c_proj.{leaf}"),
        names.FC1: Transposed(LAYER + "mlp.c_fc.{leaf}"),
        names.FC2: Transposed(LAYER + "mlp.c_proj.{leaf}"),
    },
    sizes=SIZES,
    defaults={"tied": True, "norm_epsilon": 1e-5},
    constants={"activation_function": "gelu"},
    args=LEARNED_POSITIONS,
    optional_prefix="transformer.",
    ignored=(LAYER + "attn.bias", LAYER + "attn.masked_bias"),
)
