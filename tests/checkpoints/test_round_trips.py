"""Every family there and back: tensors equal to the bit, and logits of the Megatron files equal to transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import NATIVE, ONE_GROUP, build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.errors import UsageError

GRIDS = {
    "1x1": Grid(),
    "2x1": Grid(2),
    "4x1": Grid(4),
    "1x2": Grid(1, 2),
    "2x2": Grid(2, 2),
    "4x2": Grid(4, 2),
    "2x2x2": Grid(2, 2, 2),
}


def there_and_back(home: Path, grid: Grid, **options) -> None:
    conversion = plan(Request(home / "hf", home / "megatron", "megatron", grid=grid, **options))
    write(conversion)
    verdict = verify(conversion)  # transformers against a forward pass over the Megatron files
    assert verdict.max_difference < 1e-5 * max(1, verdict.largest_logit), verdict
    assert verdict.top1_agreement == 1
    write(plan(Request(home / "megatron", home / "back", "hf")))
    first, second = load_file(home / "hf" / "model.safetensors"), load_file(home / "back" / "model.safetensors")
    assert set(first) == set(second)
    for key, tensor in first.items():
        start = 2 if key == "model.decoder.embed_positions.weight" else 0  # OPT: rows of pads
        assert torch.equal(tensor[start:], second[key][start:]), key


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NATIVE)
def test_there_and_back(name: str, grid: str, tmp_path: Path) -> None:
    build(name, tmp_path / "hf")
    there_and_back(tmp_path, GRIDS[grid])


@pytest.mark.parametrize("style", ["local", "legacy"])
@pytest.mark.parametrize("grid", ["2x2", "2x2x2"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-bias-tied", "gpt2", "bloom"])
def test_other_names(name: str, style: str, grid: str, tmp_path: Path) -> None:
    build(name, tmp_path / "hf")
    there_and_back(tmp_path, GRIDS[grid], names=style)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-tied", "mixtral", "qwen2_moe", "gpt2", "bloom"])
def test_torch_dist(name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "hf")
    there_and_back(tmp_path, Grid(), layout="torch_dist")


@pytest.mark.parametrize("style", ["transformer-engine", "local"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_over_ranks(name: str, style: str, tmp_path: Path) -> None:
    build(name, tmp_path / "hf")
    there_and_back(tmp_path, Grid(2, 2, 1, 2), names=style)


def test_the_norm_before_experts_is_fused_into_nothing(tmp_path: Path) -> None:
    """As megatron-core's Transformer Engine layers have it (test_real_megatron.py)."""
    keys = {}
    for name in ("mixtral", "llama"):
        build(name, tmp_path / name)
        (file,) = plan(Request(tmp_path / name, tmp_path / "megatron", "megatron")).target.files.values()
        keys[name] = {key for key in file.entries if key.startswith("model/decoder.layers.1.") and "norm" in key}
    first = "model/decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert keys["mixtral"] == {first, "model/decoder.layers.1.pre_mlp_layernorm.weight"}
    assert keys["llama"] == {first, "model/decoder.layers.1.mlp.linear_fc1.layer_norm_weight"}


def test_an_expert_rank_is_told_from_a_pipeline_rank(tmp_path: Path) -> None:
    build("mixtral", tmp_path / "hf")
    there_and_back(tmp_path, Grid(2, 1, 1, 4))
    assert (tmp_path / "megatron" / "release" / "mp_rank_01_003").is_dir()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ONE_GROUP)
def test_one_group_is_on_every_rank(name: str, ranks: int, tmp_path: Path) -> None:
    build(name, tmp_path / "hf")
    there_and_back(tmp_path, Grid(ranks, 2), names="legacy")


def test_one_group_does_not_divide_in_core(tmp_path: Path) -> None:
    build("starcoder", tmp_path / "hf")
    with pytest.raises(UsageError, match="--names legacy"):
        plan(Request(tmp_path / "hf", tmp_path / "megatron", "megatron", grid=Grid(2)))


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_transformer_layer(name: str, tmp_path: Path) -> None:
    build(name, tmp_path / "hf")
    conversion = plan(Request(tmp_path / "hf", tmp_path / "te", "te", grid=Grid(2)))
    write(conversion)
    assert verify(conversion).holds
    write(plan(Request(tmp_path / "te", tmp_path / "back", "hf")))
    first, second = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
