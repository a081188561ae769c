"""Two checkpoints, tensor by tensor; never more than one tensor of each in memory.

A Megatron checkpoint has the tensors that `rlhf convert --to hf` would write; nothing is written. What it is compared with is
then read by the same tables, so that a head which is the embedding, say, is in neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.directory import is_megatron
from rlhf.checkpoints.hugging_face import CONFIG
from rlhf.checkpoints.plan import Step
from rlhf.checkpoints.writing import hold
from rlhf.errors import DataError

Readers = dict[str, Callable[[], Tensor]]
"""Hugging Face's name of a tensor -> what reads it."""


@dataclass(frozen=True)
class TensorDifference:
    name: str
    what: str
    largest: float = float("inf")
    """Of |a - b|; infinite where the two cannot be subtracted."""
    relative: float = float("inf")
    """|a - b| / |a|, by their Frobenius norms."""


@dataclass(frozen=True)
class WeightComparison:
    tensors: int
    equal: int
    differing: list[TensorDifference]
    """The largest relative difference first."""

    def as_json(self) -> dict[str, Any]:
        differing = [
            {key: None if value == float("inf") else value for key, value in vars(one).items()} for one in self.differing
        ]
        return {"equal": not self.differing, "tensors": self.tensors, "equal_tensors": self.equal, "differing": differing}


def compare_weights(one: Path, other: Path, config: Path | None = None) -> WeightComparison:
    """Compares Hugging Face directories and Megatron checkpoints.

    Args:
        config: a Hugging Face directory of the model, for a Megatron checkpoint that does not say enough of itself; without it
            that is the other one, where it has a config.json.

    Raises:
        DataError: a directory has no weights, or broken ones, or a Megatron checkpoint is not of that model.
    """
    if is_megatron(one) or is_megatron(other):
        sides = _converted(one, config or _config(other)), _converted(other, config or _config(one))
    else:
        sides = _stored(one), _stored(other)
    names = sorted({*sides[0], *sides[1]})
    found = [difference for name in names if (difference := _difference(name, *sides))]
    found.sort(key=lambda one: (-one.relative, one.name))
    return WeightComparison(len(names), len(names) - len(found), found)


def _difference(name: str, one: Readers, other: Readers) -> TensorDifference | None:
    if name not in one or name not in other:
        return TensorDifference(name, f"only in {'the second' if name in other else 'the first'}")
    a, b = one[name](), other[name]()
    if a.shape != b.shape:
        return TensorDifference(name, f"shape {list(a.shape)} and {list(b.shape)}")
    types = f", {_type(a)} and {_type(b)}" if a.dtype != b.dtype else ""
    if not types and torch.equal(*(side.contiguous().reshape(-1).view(torch.uint8) for side in (a, b))):
        return None
    a, b = a.double(), b.double()
    gap = a - b
    norm = float(a.norm())
    if not gap.isfinite().all():
        counts = [int((~side.isfinite()).sum()) for side in (a, b)]
        return TensorDifference(name, f"NaN or infinity in {counts[0]} and {counts[1]} of {gap.numel()} places{types}")
    relative = float(gap.norm()) / norm if norm else float("inf") if gap.any() else 0.0
    largest = float(gap.abs().max()) if gap.numel() else 0.0
    return TensorDifference(name, f"largest {largest:.3g}, relative {relative:.3g}{types}", largest, relative)


def _stored(directory: Path) -> Readers:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory}: no .safetensors in it; a checkpoint of another kind is first converted (rlhf convert)")
    return {name: partial(_read, file, name) for file in files for name in _names(file)}


def _converted(place: Path, config: Path | None) -> Readers:
    """As the converter would write it to Hugging Face."""
    own = not is_megatron(place) or any((home / CONFIG).is_file() for home in (place, place.parent))
    conversion = plan(Request(place, place / "converted", "hf", config=None if own else config))
    for check in conversion.checks:
        hold(check)
    return {
        key: partial(_part, step, number) for step in conversion.target.steps for number, (_, key) in enumerate(step.targets)
    }


def _config(place: Path) -> Path | None:
    return place if (place / CONFIG).is_file() else None


def _part(step: Step, number: int) -> Tensor:
    return step.split(step.source.read())[number]


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise DataError(f"{file}: not a safetensors file that can be read: {error}") from error


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
