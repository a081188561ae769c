"""Laying out a checkpoint of the layout `torch`: which rank's file holds which part of which tensor, under which key."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from rlhf.checkpoints import names
from rlhf.checkpoints.operations import Heads, QueryAndKeyValue, split_ranks
from rlhf.checkpoints.plan import Entry, Step, Target, TargetFile, parts_of
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.stored import Stored
from rlhf.checkpoints.templates import fill
from rlhf.errors import DataError, UsageError

DIRECTORY, FILE = "release", "model_optim_rng.pt"
OLD_STYLES = ("legacy", "transformer-layer")
LINEAR = re.compile(r"\.(linear_qkv|linear_proj|linear_fc1|linear_fc2|query_key_value|dense\w*)\.$")
NORM = re.compile(r"\.(final_layernorm|q_layernorm|k_layernorm|pre_mlp_layernorm)\.$")
"""Modules that keep an `_extra_state`, which loading asks for: None in Megatron's own layers, an empty tensor in Transformer
Engine's, whose norms have one, too."""


def lay_out(tensors: Mapping[str, Stored], heads: Heads, grid: Grid, style: str, args: Namespace) -> Target:
    """Every rank's file, and the steps that fill them. `tensors` are ours, the vocabulary padded already.

    Raises:
        UsageError: the model cannot be spread over so many ranks.
    """
    layers, experts = int(args.num_layers), int(args.num_experts or 0)
    _divides("--pp times --vpp", grid.pipeline * grid.virtual, "layers", layers)
    _divides("--ep", grid.expert, "experts", experts or grid.expert)
    _divides("--tp", grid.tensor, "attention heads", heads.heads)
    if grid.virtual > 1 and grid.pipeline == 1:
        raise UsageError("--vpp: takes turns round a pipeline; give --pp, too")
    target = Target(f"Megatron, format torch, {style} names, TP {grid.tensor} x PP {grid.pipeline}")
    ranks = [(t, p, e) for t in range(grid.tensor) for p in range(grid.pipeline) for e in range(grid.expert)]
    for rank in ranks:
        name = _file(rank, grid)
        target.files[name] = TargetFile(name, "pt", {}, {"args": args, "checkpoint_version": 3.0, "iteration": 0})
    for ours, stored in tensors.items():
        _place(target, ours, stored, tensors, heads, grid, style, layers, experts)
    if names.HEAD not in tensors and grid.pipeline > 1:
        _place_copy_of_embedding(target, tensors[names.EMBEDDING], grid, style)
    _extra_states(target, style)
    target.texts["latest_checkpointed_iteration.txt"] = DIRECTORY
    return target


def _divides(flag: str, ranks: int, what: str, size: int) -> None:
    if size % ranks:
        raise UsageError(f"{flag} {ranks}: the model's {size} {what} do not divide by it")


def _file(rank: tuple[int, int, int], grid: Grid) -> str:
    tensor, pipeline, expert = rank
    place = f"mp_rank_{tensor:02d}"
    place += f"_{pipeline:03d}" if grid.pipeline > 1 else ""
    place += f"_{expert:03d}" if grid.expert > 1 else ""
    return f"{DIRECTORY}/{place}/{FILE}"


def _place(
    target: Target,
    ours: str,
    stored: Stored,
    tensors: Mapping[str, Stored],
    heads: Heads,
    grid: Grid,
    style: str,
    layers: int,
    experts: int,
) -> None:
    template, values = names.template_of(ours)
    values = dict(values)
    virtual = pipeline = 0
    if "layer" in values:
        per_stage = layers // (grid.pipeline * grid.virtual)
        block, local = divmod(int(values["layer"]), per_stage)
        virtual, pipeline = divmod(block, grid.pipeline)
        values["layer"] = str(local)
    elif template in (names.FINAL_NORM, names.HEAD):
        virtual, pipeline = grid.virtual - 1, grid.pipeline - 1
    expert_ranks = range(grid.expert)
    if "expert" in values:
        rank, local = divmod(int(values["expert"]), experts // grid.expert)
        expert_ranks, values["expert"] = range(rank, rank + 1), str(local)
    splits = _splits(template, values, ours, stored, tensors, heads, grid, style)
    for written, split, how, shared in splits:
        key = _key(fill(written, values), virtual, grid, style)
        places = [_file((t, pipeline, e), grid) for e in expert_ranks for t in range(grid.tensor)]
        try:
            shapes = parts_of(stored, split)
        except RuntimeError as error:
            raise UsageError(f"--tp {grid.tensor}: {ours} {list(stored.shape)}: {error}") from error
        for index, place in enumerate(places):
            shape = shapes[0] if shared else shapes[index % grid.tensor]
            target.files[place].entries[key] = Entry(shape, stored.dtype)
        repeated = partial(_repeated, split=split, times=len(places) // (1 if shared else grid.tensor))
        target.steps.append(Step(ours, stored, repeated, how, tuple((place, key) for place in places)))


def _repeated(tensor: Tensor, split, times: int) -> list[Tensor]:
    return list(split(tensor)) * times


def _splits(
    template: str,
    values: Mapping[str, str],
    ours: str,
    stored: Stored,
    tensors: Mapping[str, Stored],
    heads: Heads,
    grid: Grid,
    style: str,
):
    """(name, how a tensor of ours is taken apart, in words, whether every rank gets the same)"""
    written = names.written_names(style)[template]
    routed = ours.replace("pre_mlp_layernorm", "mlp.router").replace(".bias", ".weight") in tensors
    if template == names.MLP_NORM and style == "transformer-engine" and routed:
        written = template  # the norm is fused into the one matrix after it, and here there are many
    dim = names.split_dimension(template, values.get("leaf"))
    if dim is None or grid.tensor == 1:
        return [(written, _alone, "copy to every rank" if grid.tensor > 1 else "copy", True)]
    if template == names.QKV and heads.groups % grid.tensor:
        return _one_group(values, heads, grid, style)
    second = tensors.get(ours.replace("linear_fc1.", "linear_fc2.").replace(".bias", ".weight"))
    gated = names.is_gated(template, stored.shape, second.shape if second else None)
    how = f"split over {grid.tensor} ranks by dimension {dim}" + (", gate and up apart" if gated else "")
    return [(written, partial(split_ranks, ranks=grid.tensor, dim=dim, gated=gated), how, False)]


def _one_group(values: Mapping[str, str], heads: Heads, grid: Grid, style: str):
    """One key and value for all queries: legacy Megatron keeps them apart and the same on every rank."""
    if heads.groups != 1 or style != "legacy":
        raise UsageError(
            f"--tp {grid.tensor}: the model's {heads.groups} groups of keys and values do not divide by it"
            + ("; --names legacy keeps one group on every rank" if heads.groups == 1 else "")
        )
    apart = QueryAndKeyValue(
        "encoder.layers.{layer}.self_attention.query.{leaf}", "encoder.layers.{layer}.self_attention.key_value.{leaf}"
    )

    def queries(fused: Tensor) -> list[Tensor]:
        return split_ranks(apart.split(fused, heads)[0], grid.tensor, 0)

    def key_value(fused: Tensor) -> list[Tensor]:
        return [apart.split(fused, heads)[1]]

    return [
        (apart.query, queries, f"queries, split over {grid.tensor} ranks", False),
        (apart.key_value, key_value, "key and value, copy to every rank", True),
    ]


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _key(name: str, virtual: int, grid: Grid, style: str) -> str:
    chunk = f"model{virtual}" if grid.virtual > 1 else "model"
    if style not in OLD_STYLES:
        return f"{chunk}/{name}"
    for section in (
        "embedding.word_embeddings.norm",
        "embedding.word_embeddings",
        "embedding.position_embeddings",
        "embedding.block_position_embeddings",
        "output_layer",
        "encoder",
    ):
        if name.startswith(f"{section}."):
            return f"{chunk}/language_model/{section.replace('.', '/')}/{name.removeprefix(f'{section}.')}"
    raise DataError(f"{name}: legacy Megatron has no place for such a tensor; take --names local or transformer-engine")


def _place_copy_of_embedding(target: Target, stored: Stored, grid: Grid, style: str) -> None:
    """The last stage of a tied model holds the embedding once more, to compute logits with."""
    chunk = f"model{grid.virtual - 1}" if grid.virtual > 1 else "model"
    key = f"{chunk}/word_embeddings_for_head/weight" if style in OLD_STYLES else f"{chunk}/{names.HEAD}"
    split = partial(split_ranks, ranks=grid.tensor, dim=0)
    places = [_file((t, grid.pipeline - 1, e), grid) for e in range(grid.expert) for t in range(grid.tensor)]
    for index, shape in enumerate(parts_of(stored, split) * grid.expert):
        target.files[places[index]].entries[key] = Entry(shape, stored.dtype)
    repeated = partial(_repeated, split=split, times=grid.expert)
    target.steps.append(Step(names.EMBEDDING, stored, repeated, "copy for the head", tuple((place, key) for place in places)))


def _extra_states(target: Target, style: str) -> None:
    if style == "transformer-layer":
        return
    engine = style == "transformer-engine"
    for file in target.files.values():
        for path in list(file.entries):
            *sections, name = path.split("/")
            module, _, _ = name.rpartition("weight")
            head = [*sections, module][-2:] == ["output_layer", ""] or module == "output_layer."
            linear, norm = LINEAR.search(module), NORM.search(module)
            if not (linear or head or (engine and norm)):
                continue
            section = file.content
            for part in sections:
                section = section.setdefault(part, {})
            empty = torch.empty(0, dtype=torch.uint8) if engine and not head else None
            section[f"{module}_extra_state"] = empty
            if engine and module.endswith("linear_qkv."):
                section[f"{module.removesuffix('linear_qkv.')}core_attention._extra_state"] = empty
