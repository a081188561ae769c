"""What every module of a model gives on fixed tokens, kept in a file: to compare precisions, devices or versions.

    FILE.safetensors    ids (S,), lengths (rows,), output.N: values of the Nth output; the rest is JSON in the metadata

Outputs stand in the order in which they were computed, so the first that differs is where two computations part. Of an output
with more than VALUES numbers every n-th is kept, the norm of all, and a digest of their bits: that something lies between two
kept ones is seen in the digest, how much in the norm, which bounds it from below.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.errors import DataError, OutputError
from rlhf.paths import beside, sync

VALUES = 2**16
"""Numbers kept of one output: 256 KiB in float32, so 100 MB for the some 400 modules of a model of 7B weights."""
KEY = "rlhf_recording"
VERSION = 2
"""1 had no digests."""


@dataclass(frozen=True)
class Output:
    """One tensor that a module gave."""

    name: str
    """The module's; with #2 where it was called again, [1] where this is the second of several tensors"""
    shape: list[int]
    dtype: str
    norm: float
    digest: str
    """SHA-256 of the bits of all values"""
    every: int
    """1: all values are kept; n: every n-th, counted through the flattened tensor"""
    values: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Recording:
    about: dict[str, Any]
    """What it was made with: model, precision, device, versions."""
    ids: Tensor
    lengths: Tensor
    outputs: list[Output]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Output]]:
    """In here every output of every module is kept in the list that this yields."""
    outputs: list[Output] = []
    calls: dict[str, int] = {}

    def keep(name: str, module: nn.Module, inputs: Any, given: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        called = name if calls[name] == 1 else f"{name}#{calls[name]}"
        given = given if isinstance(given, tuple | list) else (given,)  # a dictionary is what the parts gave, once more
        for number, tensor in enumerate(given):
            if isinstance(tensor, Tensor):
                outputs.append(_kept(called if number == 0 else f"{called}[{number}]", tensor))

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _kept(name: str, tensor: Tensor) -> Output:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()
    every = _stride(tensor.numel(), tensor.shape[-1] if tensor.dim() else 1)
    here = tensor.flatten().cpu().contiguous()
    norm, digest = float(tensor.double().norm()), hashlib.sha256(here.view(torch.uint8).numpy().data).hexdigest()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Output(name, list(tensor.shape), dtype, norm, digest, every, here[::every].clone())


def _stride(count: int, width: int) -> int:
    """So that no more than VALUES are kept, and of every column some."""
    every = -(-count // VALUES) or 1
    while math.gcd(every, width) > 1:
        every += 1
    return every


def write_recording(file: Path, recording: Recording) -> None:
    """The file appears complete or not at all.

    Raises:
        OutputError: the system refuses it.
    """
    tensors = {"ids": recording.ids.cpu(), "lengths": recording.lengths}
    tensors |= {f"output.{number}": output.values.contiguous() for number, output in enumerate(recording.outputs)}
    told = [{name: value for name, value in vars(output).items() if name != "values"} for output in recording.outputs]
    about = json.dumps({"version": VERSION, "about": recording.about, "outputs": told})
    partial_file = beside(file)
    try:
        save_file(tensors, partial_file, metadata={"format": "pt", KEY: about})
        sync(partial_file)
        partial_file.replace(file)
    except (OSError, SafetensorError) as error:
        partial_file.unlink(missing_ok=True)
        raise OutputError(f"{file}: cannot be written: {error}; name another file") from error
    except BaseException:
        partial_file.unlink(missing_ok=True)
        raise


def read_recording(file: Path) -> Recording:
    """Raises DataError where the file is none that `write_recording` wrote."""
    try:
        with safe_open(file, "pt") as opened:
            told = json.loads((opened.metadata() or {})[KEY])
            if told["version"] != VERSION:
                raise DataError(f"{file}: a recording of version {told['version']}, this rlhf reads {VERSION}: record it again")
            outputs = [
                Output(**output, values=opened.get_tensor(f"output.{number}")) for number, output in enumerate(told["outputs"])
            ]
            return Recording(told["about"], opened.get_tensor("ids"), opened.get_tensor("lengths"), outputs)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: no recording of `rlhf compare MODEL --record FILE` ({error}); of weights, name the directory"
        ) from error


@dataclass(frozen=True)
class OutputDifference:
    name: str
    relative: float
    """|a - b| / |a| by their Frobenius norms, over the values kept, or what the norms of all differ by where that is more;
    infinite where the two cannot be subtracted"""
    same_bits: bool = False
    """In all values, also those that were not kept, and in their type"""
    largest: float = math.inf
    place: list[int] = field(default_factory=list)
    """index of the largest difference in the module's output"""
    one: float | None = None
    other: float | None = None
    what: str = ""
    types: str = ""
    """Both, where they are two"""


@dataclass(frozen=True)
class RecordingComparison:
    made_of: dict[str, tuple[Any, Any]]
    outputs: list[OutputDifference]
    """In the order of computation; what only one of the two has comes last."""
    first: OutputDifference | None
    """The first whose relative error is above the tolerance; with a tolerance of 0 the first that has other bits."""

    @property
    def equal(self) -> bool:
        return self.first is None

    def as_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "made_of": [{"name": name, "one": one, "other": other} for name, (one, other) in self.made_of.items()],
            "first": None if self.first is None else _plain(self.first),
            "outputs": [_plain(output) for output in self.outputs],
        }


def _plain(output: OutputDifference) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(output).items()
    }


def compare_recordings(one: Path, other: Path, tolerance: float = 0.0) -> RecordingComparison:
    """Raises DataError where one is no recording, or they are of different tokens."""
    a, b = read_recording(one), read_recording(other)
    if not (torch.equal(a.ids, b.ids) and torch.equal(a.lengths, b.lengths)):
        raise DataError(f"{other}: was recorded on other tokens than {one}; give both the same --data, --rows and --tokens")
    theirs = {output.name: output for output in b.outputs}
    names = {output.name for output in a.outputs}
    found = [_difference(output, theirs.get(output.name)) for output in a.outputs]
    found += [OutputDifference(name, math.inf, what="only in the second") for name in theirs if name not in names]
    first = next((part for part in found if part.relative > tolerance or not (tolerance or part.same_bits)), None)
    about = {name: (a.about.get(name), b.about.get(name)) for name in a.about | b.about}
    return RecordingComparison({name: pair for name, pair in about.items() if pair[0] != pair[1]}, found, first)


def _difference(one: Output, other: Output | None) -> OutputDifference:
    if other is None:
        return OutputDifference(one.name, math.inf, what="only in the first")
    if one.shape != other.shape:
        return OutputDifference(one.name, math.inf, what=f"shape {one.shape} and {other.shape}")
    types = f"{one.dtype} and {other.dtype}" if one.dtype != other.dtype else ""
    if one.digest == other.digest and not types:
        return OutputDifference(one.name, 0.0, True, 0.0)
    a, b = one.values.double(), other.values.double()
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(gap.argmax()) if gap.numel() else 0
    of_all = _ratio(_apart(one.norm, other.norm), one.norm) if one.every > 1 else 0.0
    if gap.numel() and gap[worst] > 0:
        place = [int(part) for part in torch.unravel_index(torch.tensor(worst * one.every), one.shape)]
        relative = _ratio(float(gap.norm()), float(a[a.isfinite()].norm()))
        what = "" if relative >= of_all else f"most in values that were not kept, relative error {of_all:.2e} by the norms"
        largest, first, second = (float(values[worst]) for values in (gap, a, b))
        return OutputDifference(one.name, max(relative, of_all), False, largest, place, first, second, what, types)
    if one.every > 1 and not types:
        return OutputDifference(one.name, of_all, what="in values that were not kept")
    equal = "equal values" if one.every == 1 else "equal values, of those that were kept"
    what = equal if types else "equal values of other bits: the sign of a zero, or those of a NaN"
    return OutputDifference(one.name, of_all, False, 0.0, what=what, types=types)


def _apart(one: float, other: float) -> float:
    """0 where both are the same infinity, or no number."""
    return 0.0 if one == other or (math.isnan(one) and math.isnan(other)) else abs(one - other)


def _ratio(gap: float, norm: float) -> float:
    return 0.0 if gap == 0 else gap / norm if norm > 0 and math.isfinite(norm) and math.isfinite(gap) else math.inf
