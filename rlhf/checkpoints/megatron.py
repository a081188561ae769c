"""Reading a Megatron checkpoint: every whole tensor, from however many files it lies in.

    ROOT/latest_checkpointed_iteration.txt
    ROOT/{release | iter_0000010}/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt        format `torch`
    ROOT/{release | iter_0000010}/{.metadata, common.pt, __0_0.distcp ...}         format `torch_dist`

Sizes are read off the tensors; what the files say of themselves (`args`) must agree. Nothing is held: a tensor is put together
when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.checkpoints import names
from rlhf.checkpoints.collect import Group, collect, complete, in_order
from rlhf.checkpoints.directory import is_torch_dist, iteration_directory
from rlhf.checkpoints.layouts import torch_dist, torch_files
from rlhf.checkpoints.layouts.heap import Heap
from rlhf.checkpoints.operations import Copy, Heads, QueryAndKeyValue, join_ranks, modern_qkv
from rlhf.checkpoints.stored import Checkpoint, Stored, alike, derived
from rlhf.checkpoints.templates import fill
from rlhf.errors import DataError

OLD_QKV = re.compile(r"\.query_key_value\.(weight|bias)$")
"""The only matrix whose rows an old checkpoint_version orders otherwise; core's linear_qkv was never in those orders."""


@dataclass(frozen=True)
class Reading:
    """What the files do not say."""

    heads: int | None = None
    """query heads, from a config.json; without it `args` must say"""
    groups: int | None = None
    """groups of keys and values, from a config.json"""
    tied: bool | None = None
    """whether the head is the embedding; without it `args` must say, or a head that is there is one of its own"""
    contiguous_gate: bool = False
    """ranks of a gated MLP hold the rows of [gate; up] one after the other: Pai's gpt3_llama converter (v0.5.1) wrote that"""


def read_megatron(path: Path, reading: Reading | None = None) -> Checkpoint:
    """A Megatron checkpoint, from its root or from one iteration's directory.

    Raises:
        DataError: files are missing or do not fit together, a key is not known, or what was read does not agree with `args`.
    """
    reading = reading or Reading()
    directory = iteration_directory(path)
    layout = torch_dist if is_torch_dist(directory) else torch_files
    heap = layout.read_heap(directory)
    groups, copies, notes = _sorted(heap, reading)
    heads = _heads(heap, groups, reading)
    shared = _keys_on_every_rank(heap, groups, heads)
    tensors = {}
    for ours in in_order(groups):
        tensors[ours] = _ours(groups[ours], groups, heap, heads, reading, shared)
    complete(tensors, str(directory))
    _agree(tensors, heap.args, heads, directory)
    warnings = _warnings(heap, groups, reading)
    return Checkpoint(
        heap.format, tensors, heap.args, (*heap.skipped, *notes), warnings, heap.tensor_parallel, heap.files, copies, heads
    )


def _sorted(heap: Heap, reading: Reading) -> tuple[dict[str, Group], dict[str, tuple[str, Stored]], list[str]]:
    """(groups by our name, copies by the name of what they must be equal to, what was left out)"""
    own = dict.fromkeys(heap.tensors)
    has_head = names.HEAD in own
    copies: dict[str, tuple[str, Stored]] = {}
    notes = []
    duplicates = {key: of for key, of in names.COPIES.items() if key in own and (has_head or of == names.EMBEDDING)}
    tied = reading.tied if reading.tied is not None else heap.args.get("untie_embeddings_and_output_weights") is False
    if has_head and tied:
        duplicates[names.HEAD] = names.EMBEDDING
    for key, of in duplicates.items():
        del own[key]
        copies[key] = (of, _joined(heap.tensors[key], 0, False))
        notes.append(f"{key}: must be equal to {of}, which is the one that counts")
    renamed = {key: names.HEAD if key in names.COPIES else key for key in own}
    found = collect(renamed.values(), names.megatron_table(), heap.place)
    back = {new: old for old, new in renamed.items()}
    groups = {group.ours: Group(group.ours, group.operation, tuple(back[key] for key in group.keys)) for group in found}
    return groups, copies, notes


def _heads(heap: Heap, groups: Mapping[str, Group], reading: Reading) -> Heads:
    """How attention is divided: heads as told, groups off the tensors."""
    own = heap.args.get("num_attention_heads")
    heads = reading.heads or own
    if not heads:
        raise DataError(f"{heap.place}: the number of attention heads is not in its args; give --config")
    if own not in (None, heads):
        raise DataError(
            f"{heap.place}: args.num_attention_heads is {own}, config.json says {heads}; is it the config of this model?"
        )
    first = {"layer": "0", "leaf": "weight"}
    proj, fused = groups.get(fill(names.PROJ, first)), groups.get(fill(names.QKV, first))
    if proj is None or fused is None:
        raise DataError(f"{heap.place}: layer 0 has no attention matrices")
    told = heap.args.get("num_query_groups") if heap.args.get("group_query_attention") else None
    width, rest = divmod(_total(heap, proj.keys[0], 1), heads)
    if isinstance(fused.operation, QueryAndKeyValue):
        rows = _rows_of_keys(heap, fused.keys[1], width, reading.groups or told)
    else:
        rows = sum(_total(heap, key, 0) for key in fused.keys)
        rows = (rows - heads * width) // 2
    number, more = divmod(rows, width) if width else (0, 1)
    if rest or more or number < 1 or heads % number:
        raise DataError(
            f"{heap.place}: {heads} attention heads do not fit its matrices (attention output takes in {heads * width + rest}, "
            f"keys have {rows} rows); is it the right --config?"
        )
    for place, said in (("args.num_query_groups", told), ("the number of groups in config.json", reading.groups)):
        if said not in (None, number):
            raise DataError(f"{heap.place}: {place} is {said}, its tensors hold {number} groups")
    return Heads(int(heads), number)


def _rows_of_keys(heap: Heap, key: str, width: int, told: int | None) -> int:
    """Rows of all keys, which lie with the values. One group on each rank is the one group of all, or one of several."""
    ranks = heap.tensors[key]
    if len(ranks) > 1 and ranks[0].shape[0] == 2 * width:
        if told not in (1, len(ranks)):
            raise DataError(
                f"{heap.place}: each rank's {key} holds one group of keys and values; whether it is the same one on all "
                "is not in its args; give --config"
            )
        return width * told
    return _total(heap, key, 0) // 2


def _keys_on_every_rank(heap: Heap, groups: Mapping[str, Group], heads: Heads) -> bool:
    """Whether every rank holds the one group of keys and values that all queries share."""
    fused = groups[fill(names.QKV, {"layer": "0", "leaf": "weight"})]
    return isinstance(fused.operation, QueryAndKeyValue) and heads.groups == 1 and len(heap.tensors[fused.keys[1]]) > 1


def _total(heap: Heap, key: str, dim: int) -> int:
    return sum(rank.shape[dim] for rank in heap.tensors[key])


def _ours(group: Group, groups: Mapping[str, Group], heap: Heap, heads: Heads, reading: Reading, shared_keys: bool) -> Stored:
    template, values = names.template_of(group.ours)
    dim = names.split_dimension(template, values.get("leaf"))
    fused = (
        template in names.GATED_PAIRS and isinstance(group.operation, Copy) and _gated(template, values, group, groups, heap)
    )
    old_order = heap.version < 2 and OLD_QKV.search(group.keys[0]) is not None
    members = []
    for position, key in enumerate(group.keys):
        ranks = heap.tensors[key]
        if old_order:
            how = f"order of version {heap.version:g}"
            order = partial(_first_modern, version=heap.version, heads=heads.heads // len(ranks))
            ranks = tuple(derived([rank], order, how) for rank in ranks)
        shared = isinstance(group.operation, QueryAndKeyValue) and position == 1 and shared_keys
        members.append(_joined(ranks, None if shared else dim, fused and not reading.contiguous_gate))
    if isinstance(group.operation, Copy):
        joined, before = members[0], heap.tensors[group.keys[0]]
    else:
        operation = group.operation
        joined, before = derived(members, lambda parts: operation.join(parts, heads), operation.how), ()
    less_one = heap.args.get("apply_layernorm_1p") or heap.args.get("layernorm_zero_centered_gamma")  # 0.16 calls it this
    if less_one and "norm" in template and group.ours.endswith(".weight"):
        # In float32: near 1 a bf16 step is 2^-7, and the stored difference is mostly finer than that.
        joined, before = derived([joined], lambda parts: parts[0].float() + 1, "add 1 in float32 (layernorm-1p)"), ()
    ranks = before if dim is not None and len(before) > 1 else ()
    return Stored(joined.shape, joined.dtype, joined.read, joined.origins, joined.how, ranks)


def _first_modern(parts: list[Tensor], version: float, heads: int) -> Tensor:
    return modern_qkv(parts[0], version, heads)


def _gated(template: str, values: Mapping[str, str], group: Group, groups: Mapping[str, Group], heap: Heap) -> bool:
    second = groups.get(fill(names.GATED_PAIRS[template], {**values, "leaf": "weight"}))
    fc2 = heap.tensors[second.keys[0]][0].shape if second else None
    return names.is_gated(template, heap.tensors[group.keys[0]][0].shape, fc2)


def _joined(ranks: Sequence[Stored], dim: int | None, gated: bool) -> Stored:
    if dim is None or len(ranks) == 1:
        return alike(ranks, "the same on every rank")
    alike([Stored(rank.shape, rank.dtype, rank.read, rank.origins) for rank in ranks], "shape")
    how = f"join {len(ranks)} ranks by dimension {dim}" + (", gate and up apart" if gated else "")
    return derived(ranks, partial(join_ranks, dim=dim, gated=gated), how)


def _agree(tensors: Mapping[str, Stored], args: Mapping[str, Any], heads: Heads, directory: Path) -> None:
    """What the tensors say and what `args` say are the same."""
    embedding = tensors[names.EMBEDDING].shape
    numbers = {int(values["layer"]) for name in tensors if "layer" in (values := names.template_of(name)[1])}
    fc2 = tensors.get("decoder.layers.0.mlp.linear_fc2.weight")
    measured = {
        "num_layers": len(numbers),
        "hidden_size": embedding[1],
        "kv_channels": tensors[fill(names.PROJ, {"layer": "0", "leaf": "weight"})].shape[1] // heads.heads,
        "padded_vocab_size": embedding[0],
        **({"ffn_hidden_size": fc2.shape[1]} if fc2 else {}),
    }
    for name, size in measured.items():
        if args.get(name) not in (None, size):
            raise DataError(f"{directory}: its tensors have {name} {size}, its args say {args[name]}; files of two models?")


def _warnings(heap: Heap, groups: Mapping[str, Group], reading: Reading) -> tuple[str, ...]:
    """What names cannot tell: whether each rank of a gated MLP holds its share of gate and up, or one of the two."""
    gated = any(
        _gated(template, values, group, groups, heap)
        for group in groups.values()
        if (found := names.template_of(group.ours))[0] in names.GATED_PAIRS and isinstance(group.operation, Copy)
        for template, values in [found]
    )
    if heap.tensor_parallel < 2 or not gated or heap.foreign is False:
        return ()
    read = "one of the two (--contiguous-gate)" if reading.contiguous_gate else "its share of both"
    other = "leave --contiguous-gate out" if reading.contiguous_gate else "give --contiguous-gate"
    return (
        f"each rank of the gated MLP is read as holding {read}. Pai's gpt3_llama converter (v0.5.1) wrote the other form under "
        f"the same names; if --verify --reference says the model is wrong, {other}",
    )
