"""Layers with routed experts and dense ones in one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rewrite import content_of, differing, rewrite
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.errors import DataError

DENSE = [0, 2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("mixed")
    build("qwen3_moe", home / "hf", mlp_only_layers=DENSE)
    return home / "hf"


@pytest.fixture
def source(home: Path, tmp_path: Path) -> Path:
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_bytes((home / name).read_bytes())
    return tmp_path / "hf"


GRIDS: list[dict[str, Any]] = [{}, {"grid": Grid(2, 2, 1, 2), "names": "local"}, {"layout": "torch_dist"}]


@pytest.mark.parametrize("options", GRIDS)
def test_there_and_back(source, options) -> None:
    megatron = source.with_name("megatron")
    write(conversion := plan(Request(source, megatron, "megatron", **options)))
    verify(conversion)
    (megatron / "config.json").unlink()
    assert plan(Request(megatron, source.with_name("out"), "hf")).config["mlp_only_layers"] == DENSE
    assert differing(megatron) == []


def test_either_name_for_the_number_of_experts(source) -> None:
    config = json.loads((source / "config.json").read_text())
    number = config.pop("num_local_experts", None) or config.pop("num_experts")
    for key in ("num_experts", "num_local_experts"):
        (source / "config.json").write_text(json.dumps(config | {key: number}))
        assert plan(Request(source, source.with_name("out"), "megatron"))
        (source / "config.json").write_text(json.dumps(config | {key: number + 1}))
        with pytest.raises(DataError, match=f"is {number + 1}, the tensors have {number}"):
            plan(Request(source, source.with_name("out"), "megatron"))


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0]}, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}])
def test_a_config_with_experts_in_other_layers(source, change) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [], "decoder_sparse_step": 2}))
    assert plan(Request(source, source.with_name("out"), "megatron"))  # every second: layers 1 and 3
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=r"its tensors in \[0, 1, 0, 1\]"):
        plan(Request(source, source.with_name("out"), "megatron"))


def test_args_say_which_layers(source) -> None:
    megatron = source.with_name("megatron")
    write(plan(Request(source, megatron, "megatron")))
    assert content_of(next(megatron.glob("release/*/*.pt")))["args"].moe_layer_freq == [0, 1, 0, 1]
    rewrite(megatron, lambda content: setattr(content["args"], "moe_layer_freq", 2))
    with pytest.raises(DataError, match=r"moe_layer_freq 2, its tensors have experts in layers \[0, 1, 0, 1\]"):
        plan(Request(megatron, source.with_name("out"), "hf"))


def test_layers_have_keys_of_their_own_in_torch_dist(source) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    for number, (dense, alike) in enumerate(((DENSE, False), ([], True))):
        if alike:
            build("qwen3_moe", source)
        megatron = source.with_name(f"megatron-{number}")
        write(plan(Request(source, megatron, "megatron", layout="torch_dist")))
        found = FileSystemReader(megatron / "iter_0000000").read_metadata().state_dict_metadata
        sizes = {key: tuple(about.size) for key, about in found.items() if hasattr(about, "size")}
        stem = "decoder.layers." if alike else "decoder.layers.1."
        assert sizes[f"{stem}mlp.router.weight"] == ((4, 4, 64) if alike else (4, 64))
        assert (f"decoder.layers.{DENSE[0]}.mlp.linear_fc1.layer_norm_weight" in sizes) == bool(dense)
        assert f"{stem}pre_mlp_layernorm.weight" in sizes
