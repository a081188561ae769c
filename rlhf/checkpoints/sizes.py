"""The sizes of a model, in our words: read off its tensors, and as config.json and Megatron's args call them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.checkpoints import names
from rlhf.checkpoints.agreement import biases, moe_layer_freq
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Heads
from rlhf.checkpoints.stored import Stored
from rlhf.checkpoints.templates import fill
from rlhf.errors import DataError

ARGS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
    "head_width": "kv_channels",
    "mlp": "ffn_hidden_size",
    "positions": "max_position_embeddings",
    "norm_epsilon": "norm_epsilon",
    "rotary_base": "rotary_base",
    "experts": "num_experts",
    "experts_per_token": "moe_router_topk",
    "expert_mlp": "moe_ffn_hidden_size",
    "shared_mlp": "moe_shared_expert_intermediate_size",
}
"""Our word -> Megatron's argument."""

MEGATRON_DEFAULTS = {"norm_epsilon": 1e-5, "rotary_base": 10000}
"""What Megatron-LM takes where its args are silent (megatron/training/arguments.py)."""

VOCABULARY_MULTIPLE = 128
"""Megatron-LM pads the vocabulary to this times the tensor-parallel ranks (--make-vocab-size-divisible-by)."""

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Over how many ranks a Megatron checkpoint is spread."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """layers' turns round the pipeline"""
    expert: int = 1


def measured(tensors: Mapping[str, Stored], heads: Heads) -> Sizes:
    """What the shapes of our tensors say."""
    first = {"layer": "0", "expert": "0", "leaf": "weight"}

    def width(template: str, dim: int) -> int | None:
        layers = (name for name in tensors if names.template_of(name)[0] == template)
        found = tensors.get(fill(template, first)) or next((tensors[name] for name in layers), None)
        return found.shape[dim] if found else None

    sizes = {
        "layers": 1 + max(int(values["layer"]) for name in tensors if "layer" in (values := names.template_of(name)[1])),
        "hidden": tensors[names.EMBEDDING].shape[1],
        "heads": heads.heads,
        "groups": heads.groups,
        "head_width": tensors[fill(names.PROJ, first)].shape[1] // heads.heads,
        "mlp": width(names.FC2, 1),
        "vocabulary": tensors[names.EMBEDDING].shape[0],
        "positions": width(names.POSITIONS, 0),
        "tied": names.HEAD not in tensors,
        "experts": width(names.ROUTER, 0),
        "expert_mlp": width(names.EXPERT_FC2, 1),
        "shared_mlp": width(names.SHARED_FC2, 1),
    }
    return {name: size for name, size in sizes.items() if size is not None}


def of_config(family: Family, config: Mapping[str, Any]) -> Sizes:
    """What config.json says."""
    found = {name: family.size(config, name) for name in {**family.sizes, **family.defaults}}
    return {name: size for name, size in found.items() if size is not None}


def of_args(args: Mapping[str, Any]) -> Sizes:
    """What Megatron's args say."""
    found = {name: args.get(argument) for name, argument in ARGS.items()}
    if args.get("moe_router_pre_softmax") is not None:
        found["router_renormalised"] = not args["moe_router_pre_softmax"]
    found["norm_epsilon"] = found["norm_epsilon"] or args.get("layernorm_epsilon")
    if args.get("num_attention_heads") and "kv_channels" in args:
        found = {**MEGATRON_DEFAULTS, **{name: size for name, size in found.items() if size is not None}}
    return {name: size for name, size in found.items() if size is not None}


def agree(seen: Sizes, told: Sizes, family: Family, place: str) -> None:
    """Tensors and config.json speak of one model.

    Raises:
        DataError: naming the first size they differ in.
    """
    for name in ("layers", "hidden", "heads", "groups", "head_width", "mlp", "experts", "expert_mlp", "shared_mlp", "tied"):
        if name == "groups" and family.groups:
            continue
        if name in seen and name in told and name in family.sizes and told[name] != seen[name]:
            raise DataError(
                f"{place}: {family.sizes[name]} is {told[name]}, the tensors have {seen[name]}; is it the config of this model?"
            )
    if told.get("vocabulary", 0) > seen["vocabulary"]:
        raise DataError(
            f"{place}: {family.sizes['vocabulary']} is {told['vocabulary']}, the embedding has {seen['vocabulary']} rows"
        )


def overridden(args: Mapping[str, Any], told: Sizes, family: Family, rotary_base_given: bool) -> Iterator[str]:
    """Warnings of what tensors cannot settle, and config.json, which counts, says otherwise than args.

    Megatron-LM's own loader of Llama leaves rotary_base in args at 10000, whatever the model's is.
    """
    said = {name: args.get(argument) for name, argument in ARGS.items()}
    said["norm_epsilon"] = said["norm_epsilon"] or args.get("layernorm_epsilon")
    if args.get("num_experts") and args.get("moe_router_pre_softmax") is not None:
        said["router_renormalised"] = not args["moe_router_pre_softmax"]
    for name in ("rotary_base", "norm_epsilon", "experts_per_token", "router_renormalised"):
        if name not in family.sizes or (name == "rotary_base" and rotary_base_given):
            continue
        if said.get(name) is not None and name in told and said[name] != told[name]:
            argument = ARGS.get(name, "moe_router_pre_softmax")
            found = args.get(argument, said[name])
            yield f"its args say {argument} {found}, config.json's {family.sizes[name]} is {told[name]}, which counts"


def config_json(family: Family, sizes: Sizes, dtype: torch.dtype, said: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for a model that came without one; `said` is what else it says of this model.

    Raises:
        DataError: something it must say is known from nowhere.
    """
    lacking = [name for name in family.sizes if name not in sizes and name not in family.defaults and name != "head_width"]
    if lacking:
        raise DataError(
            f"a {family.name} config.json also says {', '.join(family.sizes[name] for name in lacking)}, which neither the "
            "tensors nor the args do; give --config, a Hugging Face directory of the same model"
        )
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_types[0], **family.constants}
    for name, key in family.sizes.items():
        if name in sizes or name in family.defaults:
            *sections, last = key.split(".")
            section = config
            for part in sections:
                section = section.setdefault(part, {})
            section[last] = sizes.get(name, family.defaults.get(name))
    config |= said
    if family.as_groups:
        config |= family.as_groups(sizes["heads"], sizes["groups"])
    _as_implied(family, sizes, config)
    if "rotary_base" in sizes and "rotary_base" in family.sizes:
        config = with_rotary_base(family, config, sizes["rotary_base"])
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def _as_implied(family: Family, sizes: Sizes, config: Mapping[str, Any]) -> None:
    """What config.json has no key for is what the family takes for granted."""
    implied = {"head_width": sizes["hidden"] // sizes["heads"], "mlp": 4 * sizes["hidden"], "groups": sizes["heads"]}
    if family.groups:
        implied["groups"] = family.groups(config) or sizes["heads"]
    for name, size in implied.items():
        if name in sizes and name not in family.sizes and sizes[name] != size:
            raise DataError(
                f"the tensors have {ARGS[name]} {sizes[name]}, and a {family.name} config.json made here would mean {size}; "
                "give --config, a Hugging Face directory of the same model, or another --family"
            )


def with_rotary_base(family: Family, config: Mapping[str, Any], base: float) -> dict[str, Any]:
    """The config with this rotary base in both places where it is looked for: transformers before and after version 5."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})  # the latter before version 5
    kind = scaling.pop("type", "default")
    section = {"rope_type": kind, **scaling, "rope_theta": float(base)}
    return {**config, family.sizes["rotary_base"]: float(base), "rope_parameters": section}


def args_namespace(
    about: Mapping[str, Any],
    sizes: Sizes,
    tensors: Collection[str],
    grid: Grid,
    padded: int,
    dtype: torch.dtype,
    style: str,
    layout: str,
) -> Namespace:
    """Megatron's args for the model, as far as they describe it."""
    told = {argument: sizes.get(name) for name, argument in ARGS.items()}
    routing = {"moe_router_pre_softmax": not sizes.get("router_renormalised", True)}
    return Namespace(
        **{**told, **routing, **about, **biases(tensors)},
        moe_layer_freq=moe_layer_freq(tensors),
        group_query_attention=sizes["groups"] != sizes["heads"],
        untie_embeddings_and_output_weights=not sizes["tied"],
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        padded_vocab_size=padded,
        vocab_size=sizes["vocabulary"],
        true_vocab_size=sizes["vocabulary"],
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        virtual_pipeline_model_parallel_size=grid.virtual if grid.virtual > 1 else None,
        expert_model_parallel_size=grid.expert,
        params_dtype=dtype,
        apply_layernorm_1p=False,
        use_legacy_models=style == "legacy",
        transformer_impl="local" if style in ("local", "legacy") else "transformer_engine",
        ckpt_format=layout,
    )
