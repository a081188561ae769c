"""Tiny models of every family as Megatron files, each made once, and packages that slow tests check against."""

from __future__ import annotations

from pathlib import Path

import apart
import pytest
from rewrite import Models
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.writing import write


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny model by name, and its Megatron files for what is asked, without config.json; each made once."""
    made: dict[str, Path] = {}

    def model(name: str, tensor: int = 1, style: str = "local") -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            build(name, made[name] / "hf")
        home = made[name] / f"{style}-{tensor}"
        if not home.exists():
            write(plan(Request(made[name] / "hf", home, "megatron", grid=Grid(tensor), names=style)))
            (home / "config.json").unlink()
        return home

    return model


@pytest.fixture(scope="session")
def megatron_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder of its own beside this environment's torch."""
    return apart.install(tmp_path_factory.mktemp("megatron-core"), "megatron-core==0.16.1")
