"""Falcon 7B: attention and MLP side by side after one norm; one key and value for all queries."""

from collections.abc import Mapping
from typing import Any

from rlhf.checkpoints import names
from rlhf.checkpoints.families.falcon_40b import ARGS, BIASES, DEFAULTS, LAYER, SHARED, SIZES
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Copy


def groups(config: Mapping[str, Any]) -> int | None:
    """One for all queries, or one for each."""
    return 1 if config.get("multi_query", True) else None


FAMILY = Family(
    name="falcon_7b",
    model_types=("falcon",),
    architecture="FalconForCausalLM",
    tensors={**SHARED, names.INPUT_NORM: Copy(LAYER + "input_layernorm.{leaf}")},
    sizes=SIZES,
    defaults=DEFAULTS,
    constants={"new_decoder_architecture": False, "parallel_attn": True, "bias": False, "alibi": False},
    args=ARGS,
    biases=BIASES,
    groups=groups,
    as_groups=lambda heads, groups: {"multi_query": groups == 1},
    when=lambda config: not config.get("new_decoder_architecture"),
)
