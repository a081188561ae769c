"""The layout `torch`: one .pt file for each rank, in a directory that names its place."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rlhf.checkpoints.layouts.heap import Heap, args_of, version_of
from rlhf.checkpoints.names import NO_WEIGHTS, modern
from rlhf.checkpoints.pickles import open_pt
from rlhf.checkpoints.stored import Stored, alike, derived, whole
from rlhf.errors import DataError

FILES = ("model_optim_rng.pt", "model_rng.pt")
DIRECTORY = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
NOT_WEIGHTS = {"args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "content_metadata"}


class Rank(NamedTuple):
    """Where a file belongs."""

    tensor: int
    pipeline: int
    expert: int


def read_heap(directory: Path) -> Heap:
    """Every tensor of every rank, layers numbered over the pipeline.

    Raises:
        DataError: a rank is missing or unreadable, or the directory holds none.
    """
    files = _files(directory)
    opened = {place: open_pt(file) for place, file in files.items()}
    first = next(iter(opened.values()))
    args = args_of(first, next(iter(files.values())))
    ranks = _ranks(directory, list(files), args)
    sizes = Rank(*(1 + max(rank[axis] for rank in ranks.values()) for axis in range(3)))
    held = {rank: (files[place], opened[place]) for place, rank in ranks.items()}
    skipped = [
        f"{files[next(iter(files))]}: {key}: no weights" for key in first if not _is_weights(key) and key not in NOT_WEIGHTS
    ]
    found: dict[str, dict[int, list[Stored]]] = defaultdict(lambda: defaultdict(list))
    first_layer = 0
    for chunk in sorted((key for key in first if _is_weights(key)), key=lambda key: int(key[5:] or 0)):
        for stage in range(sizes.pipeline):
            layers = 0
            for rank, (file, content) in held.items():
                if rank.pipeline != stage:
                    continue
                if chunk not in content:
                    raise DataError(f"{file}: {chunk} is missing; other ranks have it")
                if not isinstance(content[chunk], Mapping):
                    raise DataError(f"{file}: {chunk} is a {type(content[chunk]).__name__}, expected tensors by name")
                count, tensors = _numbered(file, content[chunk], first_layer, rank.expert, sizes.expert, args, skipped)
                layers = max(layers, count)
                for key, tensor in tensors:
                    found[key][rank.tensor].append(tensor)
            first_layer += layers
    return Heap(
        place=str(directory),
        format=f"Megatron, format torch, TP {sizes.tensor} x PP {sizes.pipeline}"
        + (f" x EP {sizes.expert}" if sizes.expert > 1 else ""),
        tensors={key: _over_ranks(key, by_rank, sizes.tensor, directory) for key, by_rank in found.items()},
        args=args,
        version=version_of(first, next(iter(files.values()))),
        tensor_parallel=sizes.tensor,
        foreign=not isinstance(first.get("args"), argparse.Namespace),
        skipped=tuple(dict.fromkeys(skipped)),
        files=tuple(str(file) for file in files.values()),
    )


def _is_weights(key: object) -> bool:
    return isinstance(key, str) and re.fullmatch(r"model\d{0,3}", key) is not None


def _files(directory: Path) -> dict[str, Path]:
    files = {}
    for place in sorted(directory.glob("mp_rank_*")):
        file = next((place / name for name in FILES if (place / name).is_file()), None)
        if DIRECTORY.fullmatch(place.name) is None:
            raise DataError(f"{place}: the name does not say which rank it is; expected mp_rank_TT, _PPP, _EEE")
        if file is None:
            raise DataError(f"{place}: no {' or '.join(FILES)} in it")
        files[place.name] = file
    if not files:
        raise DataError(f"{directory}: no mp_rank_* directory and no .metadata: this is no Megatron checkpoint")
    return files


def _ranks(directory: Path, places: list[str], args: Mapping[str, Any]) -> dict[str, Rank]:
    """Which rank each directory is. With one number after the first, only `args` tell a pipeline stage from an expert rank."""
    told = {axis: args.get(f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline", "expert")}
    one_is_expert = (told["expert"] or 1) > 1 and (told["pipeline"] or 1) == 1
    ranks = {}
    for place in places:
        found = DIRECTORY.fullmatch(place)
        assert found is not None
        second, third = int(found[2] or 0), int(found[3] or 0)
        ranks[place] = Rank(int(found[1]), 0, second) if one_is_expert and not found[3] else Rank(int(found[1]), second, third)
    sizes = Rank(*(1 + max(rank[axis] for rank in ranks.values()) for axis in range(3)))
    for axis, size in sizes._asdict().items():
        if told[axis] not in (None, size):
            raise DataError(
                f"{directory}: holds {size} {axis}-parallel ranks, its args say {told[axis]} ({axis}_model_parallel_size); "
                "are files missing, or left from another run?"
            )
    if args.get("expert_tensor_parallel_size") not in (None, sizes.tensor) and sizes.expert > 1:
        raise DataError(
            f"{directory}: experts are spread over {args['expert_tensor_parallel_size']} tensor ranks and the rest over "
            f"{sizes.tensor}; such checkpoints are not read, save as torch_dist"
        )
    there = set(ranks.values())
    for tensor in range(sizes.tensor):
        for pipeline in range(sizes.pipeline):
            for expert in range(sizes.expert):
                if Rank(tensor, pipeline, expert) not in there:
                    raise DataError(
                        f"{directory}: tensor rank {tensor}, pipeline rank {pipeline}, expert rank {expert} is missing"
                    )
    return ranks


def _numbered(
    file: Path,
    tree: Mapping[str, Any],
    first_layer: int,
    expert_rank: int,
    expert_ranks: int,
    args: Mapping[str, Any],
    skipped: list[str],
) -> tuple[int, list[tuple[str, Stored]]]:
    """(layers of this part, its tensors with layers and experts numbered over the whole model)"""
    layers, tensors = 0, []
    flat = dict(_flat(tree))
    per_rank = int(args.get("num_experts") or 0) // expert_ranks
    for key, value in flat.items():
        if NO_WEIGHTS.search(key) or not isinstance(value, Tensor):
            skipped.append(f"{re.sub(r'[.]layers[.][0-9]+[.]', '.layers.*.', modern(key))}: no weights of its own")
            continue
        for name, stored in _one_by_one(modern(key), whole(value, f"{file}: {key}"), per_rank):
            if layer := re.search(r"\.layers\.(\d+)\.", name):
                layers = max(layers, int(layer[1]) + 1)
                name = f"{name[: layer.start(1)]}{first_layer + int(layer[1])}{name[layer.end(1) :]}"
            if expert_rank and (expert := re.search(r"(?<=local_experts\.)\d+|(?<=\.weight)\d+$", name)):
                name = f"{name[: expert.start()]}{expert_rank * per_rank + int(expert[0])}{name[expert.end() :]}"
            tensors.append((name, stored))
    return layers, tensors


def _one_by_one(key: str, stored: Stored, experts: int) -> Iterator[tuple[str, Stored]]:
    """A tensor, or each expert's where the old GroupedMLP keeps all of a rank in one, transposed.

    Source: Megatron-LM core 0.8, megatron/core/transformer/moe/experts.py, GroupedMLP: weight1 (H, E * 2F), weight2 (E * F, H),
    each viewed as (E, in, out).
    """
    old = re.fullmatch(r"(.*\.experts)\.weight([12])", key)
    if old is None:
        yield key, stored
        return
    if not experts:
        raise DataError(f"{stored.origins[0]}: holds several experts, and args.num_experts does not say how many")
    rows = stored.shape[0] if old[2] == "1" else stored.shape[0] // experts
    for expert in range(experts):
        take = partial(_expert, experts=experts, rows=rows, expert=expert)
        yield (
            f"{old[1]}.local_experts.{expert}.linear_fc{old[2]}.weight",
            derived([stored], take, f"expert {expert}, transposed"),
        )


def _expert(parts: list[Tensor], experts: int, rows: int, expert: int) -> Tensor:
    return parts[0].view(experts, rows, -1)[expert].t()


def _over_ranks(key: str, by_rank: Mapping[int, list[Stored]], ranks: int, directory: Path) -> tuple[Stored, ...]:
    for rank in range(ranks):
        if rank not in by_rank:
            other = next(iter(by_rank.values()))[0]
            raise DataError(f"{directory}: {key} is missing on tensor rank {rank}; {other.origins[0]} is there")
    return tuple(alike(by_rank[rank], "the same wherever it is held") for rank in range(ranks))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
