"""What a model computes beside its sizes, as Megatron's args say it and as config.json does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.checkpoints.family import Family
from rlhf.errors import DataError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "use_rope_scaling": (False,),
    "rope_type": ("rope",),
    "mrope_section": (),
    "no_rope_freq": (),
    "window_size": (),
    "window_attn_skip_freq": (),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (),
    "softmax_type": ("vanilla",),
    "qk_l2_norm": (False,),
    "attention_output_gate": (False,),
    "multi_latent_attention": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1.0,),
    "moe_router_num_groups": (),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_pre_softmax": (False,),
}
"""Arguments of Megatron-LM (0.16.1) that change the forward pass, and the values under which they do not; None never does."""

ROPE_SCALING = ("use_rope_scaling", "rope_scaling_factor")
ROPE = ("rotary_", "use_rope_", "rope_", "mrope_", "no_rope_")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's use_rope_scaling computes with beside the factor (megatron-core 0.16.1, rotary_pos_embedding.py)."""

EXACT = {True: ("silu", "swish"), False: ("gelu", "gelu_python")}
"""Activations that Megatron computes unless it is told otherwise, by whether the MLP is gated."""


def unusual(args: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Args that change what a model of the family computes from what its tensors and sizes say."""
    told = dict(args)
    if not args.get("num_experts"):
        told = {name: value for name, value in told.items() if not name.startswith("moe_")}
    if "router_renormalised" in family.sizes:  # config.json says it
        told.pop("moe_router_pre_softmax", None)
    if family.args.get("position_embedding_type") != "rope":
        told = {name: value for name, value in told.items() if not name.startswith(ROPE)}
    found = {name: told[name] for name, values in NEUTRAL.items() if told.get(name) is not None and told[name] not in values}
    return found | ({"rope_scaling_factor": float(told.get("rope_scaling_factor") or 8)} if "use_rope_scaling" in found else {})


def as_config(unusual_args: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a config.json that is made says of them.

    Raises:
        DataError: one that no table here turns into keys of config.json.
    """
    others = {name: value for name, value in unusual_args.items() if name not in ROPE_SCALING}
    if others:
        said = ", ".join(f"{name} {value!r}" for name, value in others.items())
        raise DataError(
            f"{place}: its args say {said}, which changes what it computes, and which a config.json made here would not say; "
            "give --config, a Hugging Face directory of the same model"
        )
    if not unusual_args:
        return {}
    return {"rope_parameters": {"rope_type": "llama3", "factor": unusual_args["rope_scaling_factor"], **LLAMA3}}


def as_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron's args say of a config.json's rotary scaling and window, where they can."""
    args: dict[str, Any] = {}
    scaling = _scaling(config)
    kind = _kind(scaling)
    if kind == "llama3" and all(scaling.get(name) == value for name, value in LLAMA3.items()):
        args |= {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}
    elif kind == "linear":
        args["rotary_seq_len_interpolation_factor"] = scaling["factor"]
    window, some = _window(config)
    if window and not some:
        args["window_size"] = (window - 1, 0)  # how far back, the token itself not counted
    if config.get("partial_rotary_factor") not in (None, 1, 1.0):
        args["rotary_percent"] = float(config["partial_rotary_factor"])
    return args


def not_as_args(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """Warnings of what a config.json says and Megatron's args cannot."""
    args, scaling = as_args(config), _scaling(config)
    if _kind(scaling) != "default" and not {"use_rope_scaling", "rotary_seq_len_interpolation_factor"} & set(args):
        yield f"config.json scales rotary positions ({_kind(scaling)}) as Megatron's args cannot say; only config.json says it"
    window, some = _window(config)
    if window and some:
        yield f"config.json has a sliding window of {window} in some layers; Megatron's args do not say it"
    if config.get("alibi"):
        yield "config.json asks for Falcon's ALiBi, which is divided by the root of the head width; Megatron's is not"
    gated = bool(family.args.get("swiglu"))
    if (name := activation(config)) and name not in EXACT[gated]:
        computed = "SiLU" if gated else "the exact GELU"
        yield f"the model's activation is {name}; Megatron computes {computed} unless it is told otherwise"


def unconfirmed(unusual_args: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Warnings of args that change the forward pass, and of which config.json, which counts, says nothing or otherwise."""
    said = as_args(config)
    if activation(config) in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_tanh"):
        said["openai_gelu"] = True
    for name, value in unusual_args.items():
        if said.get(name) != (tuple(value) if isinstance(value, list) else value):
            yield f"its args say {name} {value!r}, config.json does not; config.json is what counts"


def activation(config: Mapping[str, Any]) -> str:
    """The name of the MLP's activation; empty where config.json leaves it to the family."""
    keys = ("hidden_act", "activation_function", "activation")
    return next((config[key] for key in keys if config.get(key)), "gelu_tanh" if config.get("model_type") == "bloom" else "")


def _scaling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _kind(scaling: Mapping[str, Any]) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _window(config: Mapping[str, Any]) -> tuple[int | None, bool]:
    """(the sliding window, whether only some layers have it)"""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return None, False
    kinds = set(config.get("layer_types") or ())
    if kinds == {"full_attention"}:
        return None, False
    return config["sliding_window"], len(kinds) > 1 or ("use_sliding_window" in config and not kinds)
