"""The layout `torch_dist`: whole tensors over all ranks, cut into pieces, in a few large files.

    .metadata        which piece of which tensor lies where (pickle of torch.distributed.checkpoint's Metadata)
    __0_0.distcp     pieces one after the other, each what torch.save writes
    common.pt        args

Tensors of layers have an axis for the layer in front, those of experts another for the expert. Source: megatron-core 0.16.1,
megatron/core/dist_checkpointing/strategies/torch.py.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf.checkpoints import names
from rlhf.checkpoints.layouts.heap import Heap, args_of
from rlhf.checkpoints.layouts.metadata import Index, Place, Whole, read_metadata
from rlhf.checkpoints.names import NO_WEIGHTS, modern
from rlhf.checkpoints.pickles import open_pt, open_tensor
from rlhf.checkpoints.plan import Entry, Step, Target, TargetFile
from rlhf.checkpoints.stored import Stored
from rlhf.checkpoints.templates import fill
from rlhf.errors import DataError

METADATA, COMMON = ".metadata", "common.pt"
ITERATION = "iter_0000000"
DESCRIPTION = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
NOT_THE_MODEL = re.compile(r"^(optimizer|rng_state|opt_param_scheduler|rerun_state_machine|iteration)(\.|/|$)")


def read_heap(directory: Path) -> Heap:
    """Every tensor of the model; nothing of the optimizer.

    Raises:
        DataError: a file is missing, cut short or holds what it should not.
    """
    metadata = read_metadata(directory / METADATA)
    common = open_pt(directory / COMMON) if (directory / COMMON).is_file() else {}
    args = args_of(common, directory / COMMON)
    tensors: dict[str, tuple[Stored, ...]] = {}
    skipped = []
    files: set[str] = set()
    for key, about in metadata.tensors.items():
        name = re.sub(r"/shard_[\d._]+$", "", modern(key.removeprefix("model.")))
        if NOT_THE_MODEL.match(key) or NO_WEIGHTS.search(name) or about is None:
            skipped.append(f"{re.sub(r'/shard_.*', '', key)}: no weights of the model")
            continue
        if sum(math.prod(shape) for _, shape in about.chunks) != math.prod(about.size):
            raise DataError(f"{directory / METADATA}: {key}: its pieces do not add up to the whole, {list(about.size)}")
        tensor = _Global(directory, key, about, metadata.places.get(key, {}))
        files.update(place.file for place in tensor.pieces.values())
        for single, stored in _one_by_one(name, key, tensor):
            tensors[single] = (stored,)
    return Heap(
        place=str(directory),
        format="Megatron, format torch_dist",
        tensors=tensors,
        args=args,
        version=3.0,
        tensor_parallel=1,
        foreign=not isinstance(common.get("args"), argparse.Namespace),
        skipped=tuple(dict.fromkeys(skipped)),
        files=tuple(str(directory / name) for name in (METADATA, *([COMMON] if common else []), *sorted(files))),
    )


@dataclass(frozen=True)
class _Global:
    """One tensor over all ranks, and where its pieces lie."""

    directory: Path
    key: str
    about: Whole
    pieces: Mapping[Index, Place]

    def part(self, front: Index) -> Stored:
        """What is at these indices of the first axes: one layer's tensor, or one expert's."""
        shape = self.about.size[len(front) :]
        files = {place.file for place in self.pieces.values()}
        origin = f"{self.directory / min(files, default='')}: {self.key}{list(front) if front else ''}"
        return Stored(shape, self.about.dtype, partial(self._read, front), (origin,))

    def _read(self, front: Index) -> Tensor:
        size = self.about.size
        wanted = [(index, index + 1) for index in front] + [(0, length) for length in size[len(front) :]]
        result: Tensor | None = None
        covered = 0
        for offset, shape in self.about.chunks:
            box = [(start, start + length) for start, length in zip(offset, shape, strict=True)]
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, box, strict=True)]
            if any(low >= high for low, high in common):
                continue
            tensor = self._piece(offset, shape)
            tensor = tensor[
                tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(common, box, strict=True))
            ]
            tensor = tensor.reshape(tensor.shape[len(front) :])
            if common == wanted:
                return tensor
            if result is None:
                result = torch.empty(size[len(front) :], dtype=self.about.dtype)
            target = tuple(slice(*edges) for edges in common[len(front) :])
            result[target] = tensor
            covered += tensor.numel()
        if result is None or covered != result.numel():
            raise DataError(f"{self.directory}: {self.key}{list(front)}: its pieces do not add up to the whole")
        return result

    def _piece(self, offset: Index, shape: Index) -> Tensor:
        place = self.pieces.get(offset)
        if place is None:
            raise DataError(f"{self.directory / METADATA}: {self.key}: no file for its piece at {list(offset)}")
        file = self.directory / place.file
        tensor = open_tensor(file, place.begin, place.length)
        if (tuple(tensor.shape), tensor.dtype) != (shape, self.about.dtype):
            raise DataError(
                f"{file}: {self.key}: holds {tuple(tensor.shape)} {tensor.dtype}, {METADATA} says {shape} {self.about.dtype}"
            )
        return tensor


def _one_by_one(name: str, key: str, tensor: _Global) -> Iterator[tuple[str, Stored]]:
    """Each layer's tensor, each expert's, of one with axes for them; `decoder.layers.3.` in a key means there is no axis."""
    size = tensor.about.size
    experts = re.search(r"\.experts\.experts\.", name)
    stacked = re.search(r"\.layers\.(?!\d+\.)", name)
    axes = size[: bool(stacked) + bool(experts)]
    if math.prod(axes) > 1_000_000:
        raise DataError(f"{tensor.directory / METADATA}: {key}: says it has {axes} layers and experts")
    for front in torch.cartesian_prod(*map(torch.arange, axes)).view(-1, len(axes)).tolist() if axes else [[]]:
        single = name
        if stacked:
            single = single.replace(".layers.", f".layers.{front[0]}.", 1)
        if experts:
            single = single.replace(".experts.experts.", f".experts.local_experts.{front[-1]}.", 1)
        yield single, tensor.part(tuple(front))


def lay_out(tensors: Mapping[str, Stored], style: str, args: argparse.Namespace) -> Target:
    """One file of pieces: a layer's tensor, or an expert's, is a piece. `tensors` are ours, the vocabulary padded already."""
    target = Target("Megatron, format torch_dist")
    data = TargetFile(f"{ITERATION}/__0_0.distcp", "distcp")
    common = TargetFile(
        f"{ITERATION}/{COMMON}", "pt", {}, {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}
    )
    target.files = {data.name: data, common.name: common}
    written = names.written_names("transformer-engine") | {
        names.EXPERT_FC1: names.LAYER + "mlp.experts.experts.linear_fc1.{leaf}",
        names.EXPERT_FC2: names.LAYER + "mlp.experts.experts.linear_fc2.{leaf}",
    }
    mixed = isinstance(args.moe_layer_freq, list)  # then megatron-core gives each layer keys of its own
    data.content = {key: [None] for key in _extra_states(tensors, args.num_layers, args.num_experts, mixed)}
    for ours, stored in tensors.items():
        template, values = names.template_of(ours)
        routed = fill(names.ROUTER, values) in tensors if "layer" in values else False
        # megatron-core 0.16.1: beside a router only its local layers keep this norm's dense name
        name = names.MLP_NORM if template == names.MLP_NORM and routed and style != "local" else written[template]
        fqn = fill(name if mixed else name.replace(".{layer}.", "."), values)
        axes = {"expert": args.num_experts} if mixed else {"layer": args.num_layers, "expert": args.num_experts}
        front = tuple(int(values[axis]) for axis in axes if axis in values)
        size = (*(int(axes[axis]) for axis in axes if axis in values), *stored.shape)
        piece = (*(1 for _ in front), *stored.shape)
        where = (fqn, (*front, *(0 for _ in stored.shape)), size)
        data.entries[ours] = Entry(piece, stored.dtype, where)
        target.steps.append(Step(ours, stored, lambda tensor: [tensor], "copy", ((data.name, ours),)))
    target.texts[f"{ITERATION}/metadata.json"] = json.dumps(DESCRIPTION)
    target.texts["latest_checkpointed_iteration.txt"] = "0"
    return target


def _extra_states(tensors: Mapping[str, Stored], layers: int, experts: int | None, mixed: bool) -> Iterator[str]:
    """The keys under which linear layers keep a state of their own, empty here; loading asks for them."""
    for ours in tensors:
        module, _, leaf = ours.rpartition(".")
        _, values = names.template_of(ours)
        if leaf != "weight" or not re.search(r"linear_(qkv|proj|fc1|fc2)$", module):
            continue
        stem = module if mixed else module.replace(f"layers.{values['layer']}.", "layers.")
        place, size = ("0", "1") if mixed else (values["layer"], str(layers))
        if "expert" in values:
            stem = stem.replace(f"experts.{values['expert']}.", "experts.experts.")
            of_expert = (values["expert"], experts) if mixed else (f"{place}.{values['expert']}", f"{size}.{experts}")
            yield f"{stem}._extra_state/shard_{of_expert[0]}_{of_expert[1]}"
        else:
            yield f"{stem}._extra_state/shard_{place}_{size}"
