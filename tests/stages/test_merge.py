"""Outputs of training in pieces, put together: FSDP's shards and LoRA adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import flags, run
from safetensors.torch import load_file
from tiny import build
from transformers import AutoModelForCausalLM

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.cli import main
from rlhf.errors import DataError


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_shards_of_torch_distributed(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    dcp.save({**state, "optimizer.state.0": torch.ones(3)}, checkpoint_id=tmp_path / "shards", no_dist=True)
    conversion = plan(Request(tmp_path / "shards", tmp_path / "merged", "hf", config=tmp_path / "base"))
    write(conversion)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(merged) == set(load_file(tmp_path / "base" / "model.safetensors"))
    for key, tensor in merged.items():
        assert torch.equal(tensor, model.state_dict()[key])
    model.save_pretrained(tmp_path / "expected")
    assert verify(conversion, tmp_path / "expected").max_difference == 0


def test_shards_need_the_model_they_are_of(tmp_path: Path) -> None:
    model = build("llama", tmp_path / "base")
    build("gpt2", tmp_path / "other")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "shards", no_dist=True)
    with pytest.raises(DataError, match="--config"):
        plan(Request(tmp_path / "shards", tmp_path / "merged", "hf"))
    with pytest.raises(DataError, match=r"transformer\..* is missing"):
        plan(Request(tmp_path / "shards", tmp_path / "merged", "hf", config=tmp_path / "other"))


def test_an_adapter_is_merged(world: Path, tmp_path: Path, capsys) -> None:
    log = tmp_path / "log"
    arguments = flags("sft", world, tmp_path / "sft", lora__rank=4)
    assert run("sft", arguments, log) == 0, log.read_text()
    assert main(["convert", str(tmp_path / "sft"), str(tmp_path / "merged"), "--to", "hf"]) == 0
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(world / "model")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "sft" / "model")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(2, 10, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
        shutil.copytree(tmp_path / "merged", tmp_path / "copy")
    assert main(["convert", str(tmp_path / "sft"), str(tmp_path / "m"), "--to", "megatron"]) == 2
    assert "--to hf merges it" in capsys.readouterr().err
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "gpt2"
