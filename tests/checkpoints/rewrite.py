"""Changing a Megatron checkpoint on disk, as a mistake or another tool would."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.writing import write

Models = Callable[..., Path]
"""`models` of conftest.py: (name, tensor-parallel ranks, style of names) -> its Megatron files"""
Change = Callable[[dict[str, Any]], object]


def content_of(file: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def rewrite(root: Path, change: Change, pattern: str = "*") -> None:
    """Apply a change to the content of every rank's file whose directory fits the pattern."""
    files = sorted(root.glob(f"*/{pattern}/model_optim_rng.pt"))
    assert files
    for file in files:
        content = content_of(file)
        change(content)
        torch.save(content, file)


def edit(key: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A change to one tensor of `model`."""

    def change(content: dict[str, Any]) -> None:
        if key in content["model"]:
            content["model"][key] = function(content["model"][key]).clone()

    return change


def copied(models: Models, tmp_path: Path, *which: Any, change: Change | None = None) -> Path:
    """A Megatron directory to spoil, with the Hugging Face model it was made from beside it as `hf`."""
    made = models(*which)
    shutil.copytree(made.parent / "hf", tmp_path / "hf")
    copy = Path(shutil.copytree(made, tmp_path / "megatron"))
    if change:
        rewrite(copy, change)
    return copy


def back(megatron: Path, **options: Any) -> dict[str, torch.Tensor]:
    out = megatron.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    write(plan(Request(megatron, out, "hf", **options)))
    return load_file(out / "model.safetensors")


def differing(megatron: Path, **options: Any) -> list[str]:
    """The tensors that come back otherwise than they were in the Hugging Face model."""
    result, original = back(megatron, **options), load_file(megatron.with_name("hf") / "model.safetensors")
    assert set(result) == set(original)
    return sorted(key for key in original if not torch.allclose(result[key].float(), original[key].float(), atol=1e-6))
