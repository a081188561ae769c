"""Compiled layers: the same run but for rounding, whatever shapes come, and the self-checks of PPO hold to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from harness import flags, metrics, run, start, wait
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]


@pytest.mark.parametrize(
    "more", [{}, {"gradient_checkpointing": "true", "lora__rank": 2}], ids=["plain", "checkpointing, LoRA"]
)
def test_a_compiled_run_is_the_plain_one(world, tmp_path, more):
    log = tmp_path / "log"
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        options = flags("ppo", world, tmp_path / name, compile=compiled, schedule__length=3, **more)
        assert wait(start("ppo", options, log), seconds=400) == 0, log.read_text()
    plain, compiled = metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")
    for one, other in zip(plain, compiled, strict=True):
        assert one["step"] == other["step"]
        assert one.keys() == other.keys()
        for key in one.keys() & {"reward/score", "kl/sequence", "policy/loss", "value/loss"}:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    assert "recompile_limit" not in log.read_text()
    files = [next((tmp_path / name / "model").glob("*model.safetensors")) for name in ("plain", "compiled")]
    weights = [load_file(file) for file in files]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


def test_fp8_is_refused(world, tmp_path):
    log = tmp_path / "log"
    assert run("sft", flags("sft", world, tmp_path / "sft", compile="true", fp8__recipe="block"), log) == 78
    assert "compile must be false with fp8.recipe" in log.read_text()
