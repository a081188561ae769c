"""Two Hugging Face directories, tensor by tensor; never more than one tensor of each in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rlhf.errors import DataError


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


def compare_weights(one: Path, other: Path) -> WeightComparison:
    """Raises DataError where a directory has no safetensors, or one of them is broken."""
    places = _places(one), _places(other)
    names = sorted(places[0] | places[1])
    found = [difference for name in names if (difference := _difference(name, *places))]
    found.sort(key=lambda one: (-one.relative, one.name))
    return WeightComparison(len(names), len(names) - len(found), found)


def _difference(name: str, one: dict[str, Path], other: dict[str, Path]) -> TensorDifference | None:
    if name not in one or name not in other:
        return TensorDifference(name, f"only in {'the second' if name in other else 'the first'}")
    a, b = _read(one[name], name), _read(other[name], name)
    if a.shape != b.shape:
        return TensorDifference(name, f"shape {list(a.shape)} and {list(b.shape)}")
    types = f", {_type(a)} and {_type(b)}" if a.dtype != b.dtype else ""
    if not types and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
        return None
    a, b = a.double(), b.double()
    gap = a - b
    norm = float(a.norm())
    relative = float(gap.norm()) / norm if norm else float("inf") if gap.any() else 0.0
    largest = float(gap.abs().max()) if gap.numel() else 0.0
    return TensorDifference(name, f"largest {largest:.3g}, relative {relative:.3g}{types}", largest, relative)


def _places(directory: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DataError(f"{directory}: no .safetensors in it; a checkpoint of another kind is first converted (rlhf convert)")
    return {name: file for file in files for name in _names(file)}


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
