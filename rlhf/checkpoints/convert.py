"""From one checkpoint to another: what was found and what will be written, from names and shapes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.checkpoints import agreement, computed, families, fp8_weights, hugging_face, megatron, names, sizes
from rlhf.checkpoints.directory import is_megatron, is_torch_dist
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.hugging_face import CARRIED, CONFIG, read_config
from rlhf.checkpoints.layouts import torch_dist, write_torch
from rlhf.checkpoints.layouts.heap import Heap
from rlhf.checkpoints.operations import concatenated
from rlhf.checkpoints.plan import Check, Target
from rlhf.checkpoints.sizes import Grid, Sizes
from rlhf.checkpoints.stored import Checkpoint, Stored, derived
from rlhf.errors import DataError, UsageError

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


def plan(request: Request) -> Conversion:
    """Everything a conversion will do, from names and shapes alone; nothing is written.

    Raises:
        DataError: the source is not what it should be; the message names the tensor or the file.
        UsageError: what is asked for does not fit the model.
    """
    _source_is_a_model(request.source)
    of_megatron = is_megatron(request.source)
    _flags_have_a_meaning(request, of_megatron)
    if request.to in ("bf16", "fp8"):
        return _plan_precision(request)
    if is_torch_dist(request.source) and (heap := torch_dist.read_heap(request.source)) and not _is_megatrons(heap):
        return _plan_merge(request, heap)
    config_home = _config_home(request, of_megatron)
    config = read_config(config_home) if config_home else {}
    family = (
        families.named(request.family)
        if request.family
        else hugging_face.family_of(config, str(config_home))
        if config
        else None
    )
    if family and config:
        agreement.agree_with_config(family, config, str((config_home or request.source) / CONFIG))
    read = _read_megatron if of_megatron else _read_hugging_face
    source = read(request, family, config)
    heads = source.heads
    assert heads is not None
    agreement.agree_with_args(source, str(request.source))
    family = family or _recognised(source)
    agreement.agree(source, family, config, str(request.source))
    seen = sizes.measured(source.tensors, heads)
    told = {**sizes.of_args(source.args), **(sizes.of_config(family, config) if config else {})}
    if request.rotary_base and "rotary_base" not in family.sizes:
        raise UsageError(f"--rotary-base: a {family.name} model has none")
    if request.rotary_base:
        told["rotary_base"] = request.rotary_base
    warnings = list(source.warnings)
    if family.mapping_only:
        warnings.append(f"{family.name}: tensor mapping only, --verify cannot prove it: {family.mapping_only}")
    if config:
        warnings += sizes.overridden(source.args, sizes.of_config(family, config), family, request.rotary_base is not None)
        sizes.agree(seen, told, family, str((config_home or request.source) / CONFIG))
    vocabulary = told.get("vocabulary") or _true_vocabulary(source.args) or seen["vocabulary"]
    known: Sizes = {**told, **seen, "vocabulary": vocabulary, "tied": seen["tied"]}
    source = _with_vocabulary(source, vocabulary)
    dtype = source.tensors[names.EMBEDDING].dtype
    tensors, checks = _placed(source, family)
    strange = computed.unusual(source.args, family)
    warnings += computed.unconfirmed(strange, config) if config else ()
    if request.to == "hf":
        target = hugging_face.lay_out(tensors, family, heads, request.shard_bytes)
        if not config:
            said = computed.as_config(strange, str(request.source))
            said |= agreement.as_config(family, tensors)
            config = sizes.config_json(family, known, dtype, said)
            warnings.append(f"config.json is made from the tensors and Megatron's args; family {family.name}")
    if request.rotary_base and config:
        config = sizes.with_rotary_base(family, config, request.rotary_base)
    if request.to != "hf":
        target = _megatron_target(request, tensors, source, family, known, dtype, config)
        warnings += computed.not_as_args(config, family)
    target.texts[CONFIG] = json.dumps(config, indent=2) + "\n" if config else ""
    carried = _carried(config_home or request.source)
    return Conversion(request, source, target, checks, family, config, carried, warnings)


def _source_is_a_model(source: Path) -> None:
    if not source.exists():
        raise DataError(f"{source}: no such directory")
    if not source.is_dir():
        raise DataError(f"{source}: a file; SRC is the directory of a model, here perhaps {source.parent}")
    if not is_megatron(source) and not (source / CONFIG).is_file():
        raise DataError(
            f"{source}: neither Megatron (latest_checkpointed_iteration.txt, mp_rank_*, .metadata) nor Hugging Face ({CONFIG})"
        )


def _flags_have_a_meaning(request: Request, of_megatron: bool) -> None:
    """No flag is passed over in silence.

    Raises:
        UsageError: a value that is no size, or a flag that has no effect beside the others.
    """
    for flag, number in (("--rotary-base", request.rotary_base), ("--shard-gb", request.shard_bytes)):
        if number is not None and not 0 < number < math.inf:
            raise UsageError(f"{flag}: expected a number above 0")
    spread = request.grid != Grid() or request.layout != "torch"
    own_names = request.names != Request.names
    of_precision = request.to in ("bf16", "fp8")
    about_the_model = request.family or request.config or request.rotary_base
    for flag, idle, why in (
        ("--tp, --pp, --vpp, --ep and --layout", spread and request.to not in ("megatron", "te"), f"--to {request.to}"),
        ("--names", own_names and request.to != "megatron", f"--to {request.to}"),
        ("--layout torch_dist", request.layout == "torch_dist" and request.to == "te", "--to te"),
        (f"--names {request.names}", own_names and request.names == "legacy" and request.layout == "torch_dist", "torch_dist"),
        ("--contiguous-gate", request.contiguous_gate and not of_megatron, "a source that is not Megatron's"),
        ("--family, --config and --rotary-base", bool(about_the_model) and of_precision, f"--to {request.to}"),
    ):
        if idle:
            raise UsageError(f"{flag}: has no meaning with {why}")


def _is_megatrons(heap: Heap) -> bool:
    """Whether torch.distributed.checkpoint's files hold Megatron's tensors, not a Hugging Face model's."""
    return bool(heap.args) or names.EMBEDDING in heap.tensors


def _plan_merge(request: Request, heap: Heap) -> Conversion:
    """A Hugging Face model that FSDP saved in shards (SHARDED_STATE_DICT), as one directory."""
    home = _config_home(request, of_megatron=False) if request.config else None
    if request.to != "hf" or home is None:
        raise DataError(
            f"{request.source}: sharded weights of a training run; they become a model with --to hf and --config, the Hugging "
            "Face directory the training started from"
        )
    config = read_config(home)
    tensors = {key: stored for key, (stored,) in heap.tensors.items()}
    expected = hugging_face.read_tensors(home)
    tied = "lm_head.weight" in tensors and "lm_head.weight" not in expected
    copies = {"lm_head.weight"} if tied else set()
    shared = set(tensors) & set(expected)
    for problem, keys in (
        ("is missing", set(expected) - set(tensors)),
        (f"is not in {home}", set(tensors) - set(expected) - copies),
        (f"has another shape in {home}", {key for key in shared if tensors[key].shape != expected[key].shape}),
    ):
        if keys:
            raise DataError(f"{request.source}: {min(keys)} {problem}")
    kept = {key: stored for key, stored in tensors.items() if key in expected}
    target = hugging_face.lay_out_as_named(kept, "Hugging Face, merged", request.shard_bytes)
    target.texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    source = Checkpoint("shards of torch.distributed.checkpoint", kept, skipped=heap.skipped, files=heap.files)
    return Conversion(request, source, target, [], None, config, _carried(home), [])


def _config_home(request: Request, of_megatron: bool) -> Path | None:
    """Where the model's config.json is: as told, in the source, or (carried along by a converter) beside its iterations."""
    if request.config:
        home = request.config.parent if request.config.name == CONFIG else request.config
        if not (home / CONFIG).is_file():
            raise DataError(f"--config {request.config}: expected a directory with a {CONFIG}, or that file")
        return home
    if not of_megatron:
        return request.source
    return next((place for place in (request.source, request.source.parent) if (place / CONFIG).is_file()), None)


def _read_hugging_face(request: Request, family: Family | None, config: Mapping[str, Any]) -> Checkpoint:
    return hugging_face.read_hugging_face(request.source, family)


def _read_megatron(request: Request, family: Family | None, config: Mapping[str, Any]) -> Checkpoint:
    told = sizes.of_config(family, config) if family and config else {}
    division = hugging_face.heads_of(config, family, request.source) if family and told.get("heads") else None
    groups = division.groups if division else None
    reading = megatron.Reading(told.get("heads"), groups, told.get("tied"), request.contiguous_gate)
    return megatron.read_megatron(request.source, reading)


def _recognised(source: Checkpoint) -> Family:
    """The one family whose table takes every tensor, and which Megatron's args do not contradict.

    Raises:
        DataError: none or several do.
    """
    fitting = []
    for family in families.families().values():
        takes_all = all(_template_in(family, name) for name in source.tensors)
        if takes_all and not family.mapping_only and not agreement.contradiction(source, family, {}):
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
    request: Request,
    tensors: dict[str, Stored],
    source: Checkpoint,
    family: Family,
    known: Sizes,
    dtype: torch.dtype,
    config: Mapping[str, Any],
) -> Target:
    assert source.heads is not None
    style = "transformer-layer" if request.to == "te" else request.names
    multiple = sizes.VOCABULARY_MULTIPLE * request.grid.tensor
    padded = -(-known["vocabulary"] // multiple) * multiple
    tensors = {
        name: _padded(stored, padded) if name in (names.EMBEDDING, names.HEAD) else stored for name, stored in tensors.items()
    }
    about = agreement.args_of(family, config) | computed.unusual(source.args, family) | computed.as_args(config)
    args = sizes.args_namespace(about, known, tensors, request.grid, padded, dtype, style, request.layout)
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
