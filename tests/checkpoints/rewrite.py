"""Changing a Megatron checkpoint on disk, as a mistake or another tool would."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
