"""The names and shapes we write for Transformer Engine are those of its real TransformerLayer (no kernel is run)."""

from __future__ import annotations

from pathlib import Path

import apart
import pytest
from tiny import build

from rlhf.checkpoints.convert import Request, plan

DRIVER = Path(__file__).with_name("real_transformer_engine.py")


@pytest.mark.slow
def test_names_and_shapes_of_a_layer(transformer_engine: Path, tmp_path: Path) -> None:
    build("llama-gqa", tmp_path / "hf")  # hidden 64, MLP 96, 8 heads in 4 groups
    target = plan(Request(tmp_path / "hf", tmp_path / "te", "te")).target
    stem = "model/language_model/encoder/layers.0."
    (file,) = target.files.values()
    ours = {key.removeprefix(stem): list(entry.shape) for key, entry in file.entries.items() if key.startswith(stem)}
    sizes = ["64", "96", "8", "4"]
    assert ours == apart.run(DRIVER, transformer_engine, *sizes, flags=("-O",), NVTE_PROJECT_BUILDING="1")
