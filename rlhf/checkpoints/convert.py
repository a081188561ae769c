"""From one checkpoint to another: planned from names and shapes, written a tensor at a time, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from rlhf.checkpoints import families, fp8_weights, hugging_face, megatron, names, sizes
from rlhf.checkpoints.directory import is_megatron
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.hugging_face import CARRIED, CONFIG, read_config
from rlhf.checkpoints.layouts import torch_dist, write_torch
from rlhf.checkpoints.operations import concatenated
from rlhf.checkpoints.plan import Check, Step, Target
from rlhf.checkpoints.sinks import open_sink
from rlhf.checkpoints.sizes import Grid, Sizes
from rlhf.checkpoints.stored import Checkpoint, Stored, derived
from rlhf.digest import file_digest
from rlhf.errors import DataError, OutputError, StorageError

MANIFEST = "conversion.json"
SCHEMA_VERSION = 1
To = Literal["hf", "megatron", "te", "bf16", "fp8"]


@dataclass(frozen=True)
class Request:
    """What a user asks for; everything with a default is found out or not needed."""

    source: Path
    destination: Path
    to: To
    family: str | None = None
    config: Path | None = None
    """a Hugging Face directory of the same model: config.json and tokenizer come from it"""
    rotary_base: float | None = None
    grid: Grid = field(default_factory=Grid)
    names: str = "transformer-engine"
    layout: Literal["torch", "torch_dist"] = "torch"
    contiguous_gate: bool = False
    shard_bytes: int = hugging_face.SHARD_BYTES


@dataclass
class Conversion:
    """A plan: what was found, what will be written."""

    request: Request
    source: Checkpoint
    target: Target
    checks: list[Check]
    family: Family | None
    config: dict[str, Any]
    carried: list[Path]
    warnings: list[str]


INEXACT = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_tanh")
"""Approximations of GELU, which differ from it by up to 1e-3."""

WRITERS = 2
"""Threads that hash and write; more than two find the disk busy."""

Progress = Callable[[int], None]
"""Told how many bytes have just been written."""


def plan(request: Request) -> Conversion:
    """Everything a conversion will do, from names and shapes alone; nothing is written.

    Raises:
        DataError: the source is not what it should be; the message names the tensor or the file.
        UsageError: what is asked for does not fit the model.
    """
    if not request.source.exists():
        raise DataError(f"{request.source}: no such directory")
    if request.to in ("bf16", "fp8"):
        return _plan_precision(request)
    of_megatron = is_megatron(request.source)
    config_home = _config_home(request, of_megatron)
    config = read_config(config_home) if config_home else {}
    family = (
        families.named(request.family)
        if request.family
        else hugging_face.family_of(config, str(config_home))
        if config
        else None
    )
    read = _read_megatron if of_megatron else _read_hugging_face
    source = read(request, family, config)
    heads = source.heads
    assert heads is not None
    family = family or _recognised(source)
    seen = sizes.measured(source.tensors, heads)
    told = {**sizes.of_args(source.args), **(sizes.of_config(family, config) if config else {})}
    if request.rotary_base:
        told["rotary_base"] = request.rotary_base
    if config:
        sizes.agree(seen, told, family, str((config_home or request.source) / CONFIG))
    vocabulary = told.get("vocabulary") or _true_vocabulary(source.args) or seen["vocabulary"]
    known: Sizes = {**told, **seen, "vocabulary": vocabulary, "tied": seen["tied"]}
    source = _with_vocabulary(source, vocabulary)
    dtype = source.tensors[names.EMBEDDING].dtype
    warnings = list(source.warnings)
    tensors, checks = _placed(source, family)
    if request.to == "hf":
        target = hugging_face.lay_out(tensors, family, heads, request.shard_bytes)
        if not config:
            config = sizes.config_json(family, known, dtype)
            warnings.append(f"config.json is made from the tensors and Megatron's args; family {family.name}")
        if request.rotary_base:
            config = sizes.with_rotary_base(family, config, request.rotary_base)
    else:
        target = _megatron_target(request, tensors, source, family, known, dtype)
        if (activation := _activation(config)) in INEXACT:
            warnings.append(
                f"the model's activation is {activation}; Megatron computes the exact GELU unless it is told otherwise"
            )
    target.texts[CONFIG] = json.dumps(config, indent=2) + "\n" if config else ""
    carried = _carried(config_home or request.source)
    return Conversion(request, source, target, checks, family, config, carried, warnings)


def _activation(config: Mapping[str, Any]) -> str:
    keys = ("hidden_act", "activation_function", "activation")
    return next((config[key] for key in keys if config.get(key)), "gelu_tanh" if config.get("model_type") == "bloom" else "")


def _config_home(request: Request, of_megatron: bool) -> Path | None:
    """Where the model's config.json is: as told, in the source, or (carried along by a converter) beside its iterations."""
    if request.config:
        return request.config if request.config.is_dir() else request.config.parent
    if not of_megatron:
        return request.source
    return next((place for place in (request.source, request.source.parent) if (place / CONFIG).is_file()), None)


def _read_hugging_face(request: Request, family: Family | None, config: Mapping[str, Any]) -> Checkpoint:
    return hugging_face.read_hugging_face(request.source, family)


def _read_megatron(request: Request, family: Family | None, config: Mapping[str, Any]) -> Checkpoint:
    told = sizes.of_config(family, config) if family and config else {}
    reading = megatron.Reading(told.get("heads"), told.get("tied"), request.contiguous_gate)
    return megatron.read_megatron(request.source, reading)


def _recognised(source: Checkpoint) -> Family:
    """The one family whose table takes every tensor, and which Megatron's args do not contradict.

    Raises:
        DataError: none or several do.
    """
    fitting = []
    for family in families.families().values():
        used = {template for name in source.tensors if (template := _template_in(family, name))}
        takes_all = all(_template_in(family, name) for name in source.tensors)
        contradicted = any(source.args.get(name) not in (None, value) for name, value in family.args.items())
        needed = {template for template in family.tensors if "{leaf}" not in template and template != names.HEAD}
        if takes_all and not contradicted and needed <= used and not family.mapping_only:
            fitting.append(family)
    if len(fitting) == 1:
        return fitting[0]
    what = "several families" if fitting else "no family"
    which = f" ({', '.join(sorted(family.name for family in fitting))})" if fitting else ""
    raise DataError(
        f"{what}{which} could have these tensors; give --family, or --config with a Hugging Face directory of the same model. "
        f"There are {', '.join(sorted(families.families()))}"
    )


def _template_in(family: Family, name: str) -> str | None:
    template, values = names.template_of(name)
    candidates = (template, template.replace("{leaf}", values.get("leaf", "")))
    return next((candidate for candidate in candidates if candidate in family.tensors), None)


def _true_vocabulary(args: Mapping[str, Any]) -> int | None:
    """The vocabulary without padding, where args tell. NullTokenizer's --vocab-size leaves its one special token out."""
    for name in ("true_vocab_size", "orig_vocab_size"):
        if args.get(name):
            return int(args[name])
    if args.get("tokenizer_type") == "NullTokenizer" and args.get("vocab_size"):
        return int(args["vocab_size"]) + 1
    return None


def _with_vocabulary(source: Checkpoint, rows: int) -> Checkpoint:
    """Embedding and head cut to the true vocabulary: the rows after it were added to divide evenly."""

    def cut(stored: Stored) -> Stored:
        extra = stored.shape[0] - rows
        return derived([stored], lambda parts: parts[0][:rows], f"leave out {extra} rows of padding") if extra > 0 else stored

    cuts = {name: cut(stored) for name, stored in source.tensors.items() if name in (names.EMBEDDING, names.HEAD)}
    copies = {key: (of, cut(stored)) for key, (of, stored) in source.copies.items()}
    return replace(source, tensors={**source.tensors, **cuts}, copies=copies)


def _placed(source: Checkpoint, family: Family) -> tuple[dict[str, Stored], list[Check]]:
    """The tensors the family has, and what must hold of the others: equal to one of those, or zero.

    Raises:
        DataError: a tensor the family has no place for, and which is no norm's bias.
    """
    tensors, checks = {}, []
    for name, stored in source.tensors.items():
        unused_bias = "norm" in name and name.endswith(".bias") and family.args.get("normalization") == "RMSNorm"
        if _template_in(family, name) and not unused_bias:
            tensors[name] = stored
        elif unused_bias:
            checks.append(Check(name, stored, None))
        else:
            raise DataError(f"{stored.origins[0]}: a {family.name} model has no {name}; is it of another family (--family)?")
    checks += [Check(key, stored, source.tensors[of]) for key, (of, stored) in source.copies.items()]
    return tensors, checks


def _megatron_target(
    request: Request, tensors: dict[str, Stored], source: Checkpoint, family: Family, known: Sizes, dtype: torch.dtype
) -> Target:
    assert source.heads is not None
    style = "transformer-layer" if request.to == "te" else request.names
    multiple = sizes.VOCABULARY_MULTIPLE * request.grid.tensor
    padded = -(-known["vocabulary"] // multiple) * multiple
    tensors = {
        name: _padded(stored, padded) if name in (names.EMBEDDING, names.HEAD) else stored for name, stored in tensors.items()
    }
    args = sizes.args_namespace(family, known, tensors, request.grid, padded, dtype, style, request.layout)
    if request.layout == "torch_dist":
        return torch_dist.lay_out(tensors, style, args)
    return write_torch.lay_out(tensors, source.heads, request.grid, style, args)


def _padded(stored: Stored, rows: int) -> Stored:
    """With its last row repeated up to the padded vocabulary, as Megatron-LM's own converter does."""
    extra = rows - stored.shape[0]
    if not extra:
        return stored

    def pad(parts: list[Tensor]) -> Tensor:
        return concatenated([parts[0], parts[0][-1:].expand(extra, -1)])

    return derived([stored], pad, f"pad with {extra} rows")


def _plan_precision(request: Request) -> Conversion:
    """The same names and files, weights in another precision."""
    config = read_config(request.source)
    tensors = hugging_face.read_tensors(request.source)
    make = fp8_weights.plan_bf16 if request.to == "bf16" else fp8_weights.plan_fp8
    target, config = make(tensors, config, request.shard_bytes)
    target.texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    files = tuple(dict.fromkeys(stored.origins[0].partition(": ")[0] for stored in tensors.values()))
    source = Checkpoint(f"Hugging Face, {config.get('model_type')}", tensors, files=files)
    return Conversion(request, source, target, [], None, config, _carried(request.source), [])


def _carried(home: Path) -> list[Path]:
    return sorted({file for pattern in CARRIED for file in home.glob(pattern) if file.is_file()})


def write(conversion: Conversion, progress: Progress = lambda _: None) -> None:
    """Carry a plan out. The destination appears complete, or not at all.

    Raises:
        OutputError: the destination is there already, or cannot be made.
        StorageError: the disk has no room for it.
        DataError: what must be equal, or zero, is not.
    """
    destination = conversion.request.destination
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OutputError(f"{destination}: is there already and not empty; name another directory, or remove it")
    partial = destination.with_name(f".{destination.name}-{os.getpid()}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        for partial_of_another in destination.parent.glob(f".{destination.name}-*.partial"):
            process = partial_of_another.name.removesuffix(".partial").rpartition("-")[2]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                shutil.rmtree(partial_of_another)  # left by a kill
        free = shutil.disk_usage(destination.parent).free
        if free < conversion.target.bytes:
            raise StorageError(f"{destination.parent}: {conversion.target.bytes:,} bytes are needed, {free:,} are free")
        partial.mkdir()
        try:
            _fill(conversion, partial, progress)
            if destination.exists():
                destination.rmdir()
            partial.rename(destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        kind = StorageError if error.errno in (5, 28, 122) else OutputError
        raise kind(f"{destination}: cannot be written: {error}") from error


def _fill(conversion: Conversion, directory: Path, progress: Progress) -> None:
    target = conversion.target
    for check in conversion.checks:
        _hold(check)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(WRITERS) as writers:
        source_digests = writers.submit(lambda: {file: file_digest(file) for file in conversion.source.files})
        sinks = {name: open_sink(directory, file) for name, file in target.files.items()}
        for step in target.steps:
            writing = [(file, key, writers.submit(sinks[file].write, key, part)) for part, file, key in _parts(step)]
            for file, key, written in writing:
                digests[f"{file}: {key}"] = written.result()
                progress(target.files[file].entries[key].bytes)
        list(writers.map(lambda sink: sink.close(), sinks.values()))
    for name, text in target.texts.items():
        if text:
            (directory / name).write_text(text)
    for file in conversion.carried:
        if file.name not in target.texts:
            shutil.copyfile(file, directory / file.name)
    (directory / MANIFEST).write_text(json.dumps(_manifest(conversion, source_digests.result(), digests), indent=1) + "\n")


def _parts(step: Step) -> Iterator[tuple[Tensor, str, str]]:
    whole = step.source.read()
    if tuple(whole.shape) != step.source.shape:
        raise DataError(f"{step.source.origins[0]}: is {tuple(whole.shape)}, planned as {step.source.shape}")
    for part, (file, key) in zip(step.split(whole), step.targets, strict=True):
        yield part, file, key


def _hold(check: Check) -> None:
    found = check.stored.read()
    if check.equal_to is None:
        if found.any():
            raise DataError(f"{check.stored.origins[0]}: the family has no such bias, and this one is not zero")
    elif not torch.equal(found, check.equal_to.read()):
        raise DataError(f"{check.stored.origins[0]}: must be equal to {check.equal_to.origins[0]}, and is not")


def _manifest(conversion: Conversion, source_digests: Mapping[str, str], digests: Mapping[str, str]) -> dict[str, Any]:
    source = conversion.source
    return {
        "schema_version": SCHEMA_VERSION,
        "from": source.format,
        "to": conversion.target.format,
        "family": conversion.family.name if conversion.family else None,
        "source": str(conversion.request.source),
        "source_files": dict(source_digests),
        "tensors": dict(digests),
        "skipped": list(source.skipped),
        "warnings": conversion.warnings,
    }
