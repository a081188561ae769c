"""The world the stages are tested in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf.training.tiny import WORDS, write_tiny_model


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """model/, critic/ and rows of every kind, over a vocabulary of eight letters."""
    directory = tmp_path_factory.mktemp("world")
    write_tiny_model(directory, seed=0)
    generator = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (count,), generator=generator))

    sft = [{"prompt": words(2, 7), "completion": f" {words(1, 6)}"} for _ in range(37)]
    pairs = [{"prompt": words(2, 7), "chosen": f" a a {words(1, 5)}", "rejected": f" h {words(1, 5)}"} for _ in range(37)]
    prompts = [{"prompt": words(2, 7)} for _ in range(29)]
    for name, rows in (("sft", sft), ("pairs", pairs), ("prompts", prompts)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
