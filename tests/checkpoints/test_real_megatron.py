"""Our files in the real megatron-core: its GPTModel loads them strictly, every key, and computes what transformers computes.

With Transformer Engine's layers it loads them, too; those compute nothing without a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.writing import write

DRIVER = Path(__file__).with_name("real_megatron.py")
MODELS = ("llama-gqa", "llama-bias-tied", "qwen2-tied", "qwen3", "mixtral", "qwen3_moe", "gpt2-exact")
ENGINE = "transformer-engine"
DEADLINE = 240


def loaded(home: Path, layout: str, layers: str, ranks: int, *packages: Path) -> str:
    """What went wrong in the processes that load the files, one a rank; empty if nothing did."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, packages)), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_PROJECT_BUILDING": "1"}
    arguments = [sys.executable, "-O", str(DRIVER), str(home / "megatron"), layout, layers, str(ranks)]
    said = [home / f"rank_{rank}.log" for rank in range(ranks)]
    started = []
    for rank, log in enumerate(said):
        with log.open("w") as file:
            command = [*arguments, str(rank), str(home / "rendezvous"), str(home / "logits.pt")]
            started.append(subprocess.Popen(command, env=environment, stderr=file))
    try:
        failed = any([process.wait(DEADLINE) for process in started])
    finally:
        for process in started:
            process.kill()
    return next((text[-3000:] for text in map(Path.read_text, said) if text), "failed") if failed else ""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ranks"), [("torch", 1), ("torch", 2), ("torch_dist", 2)])
@pytest.mark.parametrize("name", MODELS)
def test_the_real_model_loads_and_agrees(name: str, layout: str, ranks: int, megatron_core: Path, tmp_path: Path) -> None:
    model = build(name, tmp_path / "hf").eval()
    ids = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    grid = Grid(ranks) if layout == "torch" else Grid()
    write(plan(Request(tmp_path / "hf", tmp_path / "megatron", "megatron", grid=grid, names="local", layout=layout)))
    with torch.no_grad():
        expected = model(ids).logits
    assert loaded(tmp_path, layout, "local", ranks, megatron_core) == ""
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks"), [("llama-gqa", 1), ("llama-gqa", 2), ("qwen3", 2), ("mixtral", 2), ("qwen3_moe", 2), ("gpt2-exact", 2)]
)
def test_its_transformer_engine_layers_load(
    name: str, ranks: int, megatron_core: Path, transformer_engine: Path, tmp_path: Path
) -> None:
    build(name, tmp_path / "hf")
    write(plan(Request(tmp_path / "hf", tmp_path / "megatron", "megatron", grid=Grid(ranks), names=ENGINE)))
    assert loaded(tmp_path, "torch", ENGINE, ranks, megatron_core, transformer_engine) == ""


@pytest.mark.slow
def test_its_transformer_engine_layers_refuse_other_names(
    megatron_core: Path, transformer_engine: Path, tmp_path: Path
) -> None:
    build("llama-gqa", tmp_path / "hf")
    write(plan(Request(tmp_path / "hf", tmp_path / "megatron", "megatron", names="local")))
    said = loaded(tmp_path, "torch", ENGINE, 1, megatron_core, transformer_engine)
    assert re.search(r"Missing key.*decoder\.layers\.0\.self_attention\.linear_qkv\.layer_norm_weight", said)
