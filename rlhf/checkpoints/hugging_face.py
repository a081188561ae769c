"""Hugging Face directories: reading their tensors as ours, and which of ours become which of theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf.checkpoints import names
from rlhf.checkpoints.collect import Group, Table, collect, complete, in_order
from rlhf.checkpoints.families import families, of_config
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Heads, Operation
from rlhf.checkpoints.pickles import open_pt
from rlhf.checkpoints.plan import Entry, Step, Target, TargetFile, parts_of
from rlhf.checkpoints.stored import Checkpoint, Stored, derived, whole
from rlhf.checkpoints.templates import Values, fill, match
from rlhf.errors import DataError

CONFIG = "config.json"
SCALAR_HEAD = "score.weight"
SHARD_BYTES = 5 * 10**9
"""As transformers' save_pretrained."""
WHOLE_NUMBERS = (
    *("layers", "hidden", "heads", "groups", "head_width", "mlp", "vocabulary", "positions"),
    *("experts", "active_experts", "expert_mlp", "shared_mlp"),
)
"""Sizes (Family.sizes) that are counts."""
CARRIED = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.*",
    "spiece.model",
    "sentencepiece*",
    "*.tiktoken",
    "ice_text.model",
)
"""What stands beside the weights and goes along with them."""


def read_config(directory: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        DataError: there is none, or it is no JSON object.
    """
    file = directory / CONFIG
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no readable config.json: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: holds a {type(found).__name__}, expected an object")
    # transformers 5 keeps rope_theta in a section; one place to look is enough for the rest of us.
    section = found.get("rope_parameters") or {}
    if not isinstance(section, dict):
        raise DataError(f"{file}: rope_parameters is a {type(section).__name__}, expected an object")
    if not isinstance(found.get("mlp_only_layers") or [], list):
        raise DataError(f"{file}: mlp_only_layers is {found['mlp_only_layers']!r:.40}, expected a list of layers")
    keys = {family.sizes[name] for family in families().values() for name in WHOLE_NUMBERS if name in family.sizes}
    keys.add("decoder_sparse_step")
    for key in sorted(keys & set(found)):
        if found[key] is not None and (type(found[key]) is not int or not 0 <= found[key] < 1 << 40):
            raise DataError(f"{file}: {key} is {found[key]!r:.40}, expected a whole number")
    return {**{key: section[key] for key in ("rope_theta", "partial_rotary_factor") if key in section}, **found}


def read_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory's weights, mapped, under its own name.

    Raises:
        DataError: there are no weights, a file is missing or cut short, a tensor is in two, or in another than the index says.
    """
    index, files = _weight_files(directory)
    tensors: dict[str, Stored] = {}
    where: dict[str, str] = {}
    for file in files:
        for key, tensor in _opened(file):
            if key in tensors:
                raise DataError(f"{file}: {key} is also in {where[key]}")
            tensors[key] = whole(tensor, f"{file}: {key}")
            where[key] = file.name
    if index is not None:
        named = _weight_map(index)
        for key in sorted({*named, *where}):
            if named.get(key) != where.get(key):
                raise DataError(f"{index}: says {key} is in {named.get(key, 'no file')}; it is in {where.get(key, 'none')}")
    return tensors


def _weight_files(directory: Path) -> tuple[Path | None, list[Path]]:
    """(the index, where there is one; the files it names, or the only one)"""
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (directory / index).is_file():
            names_of_files = sorted(set(_weight_map(directory / index).values()))
            for name in names_of_files:
                if Path(name).name != name:
                    raise DataError(f"{directory / index}: {name!r} leads out of the directory")
                if not (directory / name).is_file():
                    raise DataError(f"{directory / name}: missing, {index} names it")
            return directory / index, [directory / name for name in names_of_files]
        if (directory / single).is_file():
            return None, [directory / single]
    raise DataError(f"{directory}: no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _weight_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in."""
    try:
        found = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) for file in found.values()):
            raise TypeError("a file's name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index}: not an index of weights: expected weight_map, a file for each tensor ({error!r})") from error
    return found


def _opened(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".bin":
        yield from ((key, value) for key, value in open_pt(file).items() if isinstance(value, Tensor))
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dictionary
                yield key, opened.get_tensor(key)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable safetensors file: {error}; is it complete?") from error


def family_of(config: Mapping[str, Any], place: str) -> Family:
    """The family a config.json belongs to.

    Raises:
        DataError: no table knows its model_type.
    """
    family = of_config(config)
    if family is None:
        raise DataError(f"{place}: no family has model_type {config.get('model_type')!r}; --family says which to take")
    return family


def read_hugging_face(directory: Path, family: Family | None = None) -> Checkpoint:
    """A Hugging Face model's tensors as ours.

    Raises:
        DataError: a tensor is unknown to the family, missing, or does not fit config.json; the model has a scalar head.
    """
    config = read_config(directory)
    family = family or family_of(config, str(directory / CONFIG))
    tensors = read_tensors(directory)
    if SCALAR_HEAD in tensors:
        raise DataError(
            f"{directory}: a reward model ({SCALAR_HEAD}), and Megatron's language models have no place for its head; stages, "
            "engines and transformers take the directory as it is, and so do --to fp8 and --to bf16"
        )
    heads = heads_of(config, family, directory)
    prefixed = {_with_prefix(key, family): stored for key, stored in tensors.items()}
    ignored = [key for key in prefixed if any(match(template, key) is not None for template in family.ignored)]
    own = {key: stored for key, stored in prefixed.items() if key not in ignored}
    groups = {group.ours: group for group in collect(own, tuple(family.tensors.items()), str(directory))}
    copies = {}
    if family.size(config, "tied") and names.HEAD in groups:
        head = groups.pop(names.HEAD)
        copies[head.keys[0]] = (names.EMBEDDING, own[head.keys[0]])
    complete(groups, str(directory))
    ours = {name: _ours(groups[name], own, heads) for name in in_order(groups)}
    return Checkpoint(
        format=f"Hugging Face, {config.get('model_type')}",
        tensors=ours,
        skipped=tuple(f"{key}: no weights of its own" for key in ignored),
        files=tuple(str(file) for file in _weight_files(directory)[1]),
        copies=copies,
        heads=heads,
    )


def _ours(group: Group, own: Mapping[str, Stored], heads: Heads) -> Stored:
    operation = group.operation
    return derived([own[key] for key in group.keys], lambda parts: operation.join(parts, heads), operation.how)


def _with_prefix(key: str, family: Family) -> str:
    prefix = family.optional_prefix
    return key if not prefix or key.startswith((prefix, "lm_head.")) else prefix + key


def heads_of(config: Mapping[str, Any], family: Family, place: Path) -> Heads:
    """How attention is divided, as config.json says."""
    heads = family.size(config, "heads")
    if not isinstance(heads, int) or heads < 1:
        raise DataError(f"{place / CONFIG}: {family.sizes['heads']} is {heads!r}, expected the number of attention heads")
    groups = family.groups(config) if family.groups else family.size(config, "groups")
    return Heads(heads, groups or heads)


def lay_out(tensors: Mapping[str, Stored], family: Family, heads: Heads, shard_bytes: int = SHARD_BYTES) -> Target:
    """Which Hugging Face tensors ours become, and in which file.

    Raises:
        DataError: the family has no name for a tensor.
    """
    table = tuple(family.tensors.items())
    rows = []
    for ours, stored in tensors.items():
        operation, values = _row_for(ours, table, family)
        keys = [fill(template, values) for template in operation.names]
        rows.append((ours, stored, partial(operation.split, heads=heads), operation.how, keys))
    return _in_shards(f"Hugging Face, {family.name}", rows, shard_bytes)


def lay_out_as_named(tensors: Mapping[str, Stored], format: str, shard_bytes: int = SHARD_BYTES) -> Target:
    """The same for tensors that keep the names they have."""
    return _in_shards(format, [(key, stored, _alone, "copy", [key]) for key, stored in tensors.items()], shard_bytes)


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _in_shards(format: str, rows: list[tuple[str, Stored, Any, str, list[str]]], limit: int) -> Target:
    target = Target(format)
    entries = [
        (key, Entry(shape, stored.dtype))
        for _, stored, split, _, keys in rows
        for key, shape in zip(keys, parts_of(stored, split), strict=True)
    ]
    shards = _shards(entries, limit)
    where = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        target.files[name] = TargetFile(name, "safetensors", dict(shard))
        where |= dict.fromkeys((key for key, _ in shard), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": target.bytes}, "weight_map": where}
        target.texts["model.safetensors.index.json"] = json.dumps(index, indent=2, sort_keys=True)
    for ours, stored, split, how, keys in rows:
        target.steps.append(Step(ours, stored, split, how, tuple((where[key], key) for key in keys)))
    return target


def _row_for(ours: str, table: Table, family: Family) -> tuple[Operation, Values]:
    for template, operation in table:
        values = match(template, ours)
        if values is not None:
            return operation, values
    raise DataError(f"{ours}: a {family.name} model has no such tensor; is it of another family (--family)?")


def _shards(entries: list[tuple[str, Entry]], limit: int) -> list[list[tuple[str, Entry]]]:
    shards: list[list[tuple[str, Entry]]] = [[]]
    size = 0
    for key, entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((key, entry))
        size += entry.bytes
    return shards
