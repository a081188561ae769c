"""Flags and paths of `rlhf convert` that have no meaning are refused, and what a flag changes is changed everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rewrite import content_of, copied
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.writing import write
from rlhf.cli import main
from rlhf.errors import DataError, UsageError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("llama") / "hf"
    build("llama", home, intermediate_size=90)
    return home


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("hf", {"grid": Grid(2)}, "--tp.*--to hf"),
        ("hf", {"layout": "torch_dist"}, "--layout.*--to hf"),
        ("te", {"names": "local"}, "--names.*--to te"),
        ("te", {"layout": "torch_dist"}, "--layout torch_dist.*--to te"),
        ("megatron", {"names": "legacy", "layout": "torch_dist"}, "--names legacy.*torch_dist"),
        ("megatron", {"contiguous_gate": True}, "--contiguous-gate"),
        ("fp8", {"family": "llama"}, "--family.*--to fp8"),
        ("megatron", {"rotary_base": float("nan")}, "--rotary-base: expected a number above 0"),
        ("megatron", {"rotary_base": -1.0}, "--rotary-base: expected a number above 0"),
        ("hf", {"shard_bytes": 0}, "--shard-gb: expected a number above 0"),
        (
            "megatron",
            {"grid": Grid(4)},
            r"--tp 4: .*0\.mlp\.linear_fc1\.weight \[180, 64\]: 90 does not divide by 4",
        ),
    ],
)
def test_a_flag_without_a_meaning(llama, tmp_path, to, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        plan(Request(llama, tmp_path / "out", to, **options))


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("hf", {}),
        ("te", {"grid": Grid(2)}),
        ("megatron", {"names": "legacy"}),
        ("megatron", {"layout": "torch_dist"}),
    ],
)
def test_the_same_flags_where_they_have_one(llama, tmp_path, to, options: dict[str, Any]) -> None:
    assert plan(Request(llama, tmp_path / "out", to, **options))


def test_a_rotary_base_for_a_model_that_has_none(tmp_path) -> None:
    build("gpt2", tmp_path / "hf")
    with pytest.raises(UsageError, match="--rotary-base: a gpt2 model has none"):
        plan(Request(tmp_path / "hf", tmp_path / "out", "megatron", rotary_base=20000.0))


def test_a_rotary_base_is_in_args_and_in_the_config_beside_them(llama, tmp_path) -> None:
    write(plan(Request(llama, tmp_path / "megatron", "megatron", rotary_base=123456.0)))
    config = json.loads((tmp_path / "megatron" / "config.json").read_text())
    args = content_of(next((tmp_path / "megatron").glob("release/*/*.pt")))["args"]
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"], args.rotary_base) == (123456.0,) * 3


@pytest.mark.parametrize("words", ["nan", "0", "-1", "inf"])
def test_shards_of_no_size(llama, tmp_path, capsys, words) -> None:
    assert main(["convert", str(llama), str(tmp_path / "out"), "--to", "hf", "--shard-gb", words]) == 2
    assert "--shard-gb: expected a number above 0" in capsys.readouterr().err
    assert main(["convert", str(llama), str(tmp_path / "out"), "--to", "hf", "--shard-gb", "0.001", "--dry-run"]) == 0


def test_a_config_that_is_not_there(models, tmp_path) -> None:
    megatron = copied(models, tmp_path, "llama")
    for there in (tmp_path / "hf", tmp_path / "hf" / "config.json"):
        assert plan(Request(megatron, tmp_path / "out", "hf", config=there))
    for typo in (tmp_path / "hf" / "typo", tmp_path / "nowhere", tmp_path / "hf" / "model.safetensors"):
        with pytest.raises(DataError, match=r"--config .*: expected a directory with a config\.json, or that file"):
            plan(Request(megatron, tmp_path / "out", "hf", config=typo))


def test_a_source_that_is_no_model(llama, tmp_path) -> None:
    with pytest.raises(DataError, match="a file; SRC is the directory of a model, here perhaps"):
        plan(Request(llama / "model.safetensors", tmp_path / "out", "hf"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither Megatron .* nor Hugging Face \(config\.json\)"):
        plan(Request(tmp_path / "empty", tmp_path / "out", "hf"))


def test_what_is_carried_along(llama, tmp_path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((llama / name).read_bytes())
    for name in ("qwen.tiktoken", "ice_text.model", "modeling_own.py"):
        (source / name).write_text(name)
    write(plan(Request(source, tmp_path / "out", "megatron")))
    assert {file.name for file in (tmp_path / "out").iterdir() if file.is_file()} == {
        "config.json",
        "conversion.json",
        "ice_text.model",
        "latest_checkpointed_iteration.txt",
        "qwen.tiktoken",
    }
