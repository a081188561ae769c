"""Where two models that should be the same part: the first place in a forward pass, and the tensors that are used there.

The places are Megatron's side's (forward.py). Where transformers' models have them is told by its own module names, in a table
of its own: a conversion that takes one tensor for another must not move the place it is looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.checkpoints.forward import Place, Side

TOLERANCE = 3e-5
"""Of the largest value at a place: between rounding (5e-6 in 24 layers of 1024) and what logits may differ by (1e-4)."""
SHOWN = 6
LAYERS = ("model.layers", "transformer.h", "model.decoder.layers")
MODULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "embedding.norm": (("transformer.word_embeddings_layernorm",),),
    "input_layernorm": (("input_layernorm",), ("ln_attn",), ("ln_1",), ("self_attn_layer_norm",)),
    "self_attention.linear_qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
    "self_attention.linear_proj": (("self_attn.o_proj",), ("self_attn.out_proj",), ("self_attention.dense",), ("attn.c_proj",)),
    "pre_mlp_layernorm": (("post_attention_layernorm",), ("ln_mlp",), ("ln_2",), ("final_layer_norm",)),
    "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.dense_h_to_4h",), ("mlp.c_fc",), ("fc1",)),
    "mlp.linear_fc2": (("mlp.down_proj",), ("mlp.dense_4h_to_h",), ("mlp.c_proj",), ("fc2",)),
    "mlp.shared_experts.linear_fc1": (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),),
    "mlp.shared_experts.linear_fc2": (("mlp.shared_expert.down_proj",),),
    "decoder.final_layernorm": (("model.norm",), ("transformer.ln_f",), ("model.decoder.final_layer_norm",)),
}
"""Our module -> what transformers' models call it; several names where they keep its matrices apart. What is not listed (fused
query, key and value; routed experts) is not looked into: an error there shows at the next place."""

Key = tuple[str, Side]


@dataclass(frozen=True)
class Held:
    """What another model holds at a place."""

    names: tuple[str, ...]
    """its own names for the modules there, one for each value"""
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Parting:
    """The first place where two models differ."""

    place: str
    tensors: tuple[str, ...]
    """of the result: what the values there are made from"""

    def __str__(self) -> str:
        if not self.tensors:
            return f"they part first at {self.place}, where no tensor is used: look at the sizes in config.json"
        more = f" and {len(self.tensors) - SHOWN} more" if len(self.tensors) > SHOWN else ""
        return f"they part first at {self.place}, made from {', '.join(self.tensors[:SHOWN])}{more}"


def first_parting(
    places: Sequence[Place], head: Sequence[str], other: Mapping[Key, Held], written: Mapping[str, Sequence[str]]
) -> Parting:
    """The first place that differs, of two models whose logits do.

    Args:
        places: a traced forward pass
        head: our names of the tensors it read last
        other: what the other model holds
        written: our name of a tensor -> the result's names, for each part that it was taken apart into
    """
    suspects: list[str] = []
    for place in places:
        suspects += place.read
        held = other.get((place.module, place.side))
        if held is None or len(held.values) != len(place.values):
            continue
        here = [name for name in suspects if name.startswith(place.within)]
        differing = [part for part, pair in enumerate(zip(place.values, held.values, strict=True)) if not _equal(*pair)]
        if differing:
            where = ", ".join(held.names[part] for part in differing)
            keys = [key for name in here for key in _keys(name, written, differing, len(place.values))]
            return Parting(f"the {place.side} of {where}", _collected(keys))
        suspects = [name for name in suspects if name not in here]
    return Parting("the head", _collected([key for name in (*suspects, *head) for key in written.get(name, [name])]))


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


def _keys(name: str, written: Mapping[str, Sequence[str]], parts: Sequence[int], of: int) -> Sequence[str]:
    keys = written.get(name, [name])
    return [keys[part] for part in parts] if len(keys) == of else keys


def _collected(keys: Sequence[str]) -> tuple[str, ...]:
    """Without repeats; all experts of a layer are one."""
    return tuple(dict.fromkeys(re.sub(r"(experts)\.\d+\.|(?<=weight)\d+$", _any_expert, key) for key in keys))


def _any_expert(found: re.Match[str]) -> str:
    return f"{found[1]}.*." if found[1] else "*"


def as_held(places: Sequence[Place]) -> dict[Key, Held]:
    """What a traced forward pass holds."""
    return {(place.module, place.side): Held((place.module,) * len(place.values), place.values) for place in places}


@torch.no_grad()
def held_by(model: nn.Module, ids: Tensor, places: Sequence[Place]) -> dict[Key, Held]:
    """What a transformers model holds at the same places, as far as it has modules for them."""
    seen: dict[tuple[str, Side], Tensor] = {}
    modules = dict(model.named_modules())
    named = {place.module: _named(place.module, modules) for place in places}
    found = {name for names in named.values() for name in names}
    hooks = [modules[name].register_forward_hook(partial(_keep, seen, name)) for name in found]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        (place.module, place.side): Held(names, tuple(seen[name, place.side] for name in names))
        for place in places
        if (names := named[place.module])
    }


def _keep(seen: dict[tuple[str, Side], Tensor], name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    seen[name, "input"], seen[name, "output"] = inputs[0].float(), output.float()


def _named(ours: str, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Its names in a transformers model; empty where it has none."""
    return next((names for names in _candidates(ours) if all(name in modules for name in names)), ())


def _candidates(ours: str) -> Iterator[tuple[str, ...]]:
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", ours)
    if layer is None:
        yield from MODULES.get(ours, ())
        return
    for names in MODULES.get(layer[2], ()):
        for layers in LAYERS:
            yield tuple(f"{layers}.{layer[1]}.{name}" for name in names)
