"""Our files in the real megatron-core: its GPTModel loads them strictly, every key, and computes what transformers computes."""

from __future__ import annotations

import os
import socket
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


@pytest.fixture(scope="module")
def megatron_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """megatron-core alone in a folder of its own, beside this environment's torch."""
    folder = tmp_path_factory.mktemp("megatron-core")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "megatron-core==0.16.1"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"megatron-core 0.16.1 cannot be installed here: {done.stderr.splitlines()[-1:]}")
    return folder


def real_logits(home: Path, layout: str, ranks: int, package: Path) -> torch.Tensor:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("COV")}
    arguments = [sys.executable, str(DRIVER), str(home / "megatron"), layout, str(ranks)]
    started = [
        subprocess.Popen(
            [*arguments, str(rank), port, str(home / "logits.pt")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[1] for process in started]
    assert not any(process.returncode for process in started), said[0][-3000:]
    return torch.load(home / "logits.pt", weights_only=True)


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
    found = real_logits(tmp_path, layout, ranks, megatron_core)
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
