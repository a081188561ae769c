"""A small run of every kind that the pages are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import flags, run
from worlds import world

__all__ = ["world"]


@pytest.fixture(scope="session")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's directory: sft/, rm/, ppo/."""
    place = tmp_path_factory.mktemp("pipeline")
    for stage in ("sft", "rm", "ppo"):
        assert run(stage, flags(stage, world, place / stage), place / "log") == 0, (place / "log").read_text()
    return place
