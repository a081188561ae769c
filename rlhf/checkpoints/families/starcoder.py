"""StarCoder (gpt_bigcode): GPT-2 with plain matrices and one key and value for all queries.

Its c_attn is in our order already: all queries, then the one key and value; or, without multi_query, head by head.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.checkpoints import names
from rlhf.checkpoints.families.gpt2 import LAYER, LEARNED_POSITIONS, NORMS, OUTSIDE, SIZES
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy


def groups(config: Mapping[str, Any]) -> int | None:
    """One for all queries, or one for each."""
    return 1 if config.get("multi_query", True) else None


FAMILY = Family(
    name="starcoder",
    model_types=("gpt_bigcode",),
    architecture="GPTBigCodeForCausalLM",
    tensors={
        **OUTSIDE,
        **NORMS,
        names.QKV: Copy(LAYER + "attn.c_attn.{leaf}"),
        names.PROJ: Copy(LAYER + "attn.c_proj.{leaf}"),
        names.FC1: Copy(LAYER + "mlp.c_fc.{leaf}"),
        names.FC2: Copy(LAYER + "mlp.c_proj.{leaf}"),
    },
    sizes=SIZES,
    defaults={"tied": True, "norm_epsilon": 1e-5},
    constants={"activation_function": "gelu_pytorch_tanh"},
    args=LEARNED_POSITIONS,
    groups=groups,
    as_groups=lambda heads, groups: {"multi_query": groups == 1},
    ignored=(LAYER + "attn.bias", LAYER + "attn.masked_bias"),
)
