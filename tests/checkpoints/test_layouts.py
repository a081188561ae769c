"""Layouts that only other writers make, made here by hand from their definitions: each must give the same model."""

from __future__ import annotations

import argparse
import types
from pathlib import Path

import pytest
import torch
from rewrite import content_of, rewrite
from safetensors.torch import load_file
from tiny import build

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.writing import write
from rlhf.errors import DataError


def equal(first: Path, second: Path) -> None:
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def written(home: Path, model: str, grid: Grid = Grid(), names: str = "legacy") -> Path:  # noqa: B008
    build(model, home / "hf")
    write(plan(Request(home / "hf", home / "megatron", "megatron", grid=grid, names=names)))
    return home / "megatron"


def read_again(home: Path, **options) -> None:
    write(plan(Request(home / "megatron", home / "back", "hf", **options)))
    equal(home / "hf", home / "back")


def in_layers(content, change) -> None:
    """Replace a legacy file's encoder by what `change(key, tensor)` yields."""
    encoder = content["model"]["language_model"]["encoder"]
    changed = {}
    for key, tensor in encoder.items():
        changed |= change(key, tensor) if isinstance(tensor, torch.Tensor) else {}
    content["model"]["language_model"]["encoder"] = changed


@pytest.mark.parametrize("version", [0, 1.0])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_old_orders_of_query_key_value(model, ranks, version, tmp_path) -> None:
    """Version 0: (3, heads, width), 1: (heads, width, 3), on each rank; no version in the file means 0."""
    root = written(tmp_path, model, Grid(ranks, 2))
    heads = 4 // ranks

    def old(key, tensor):
        if "query_key_value" not in key:
            return {key: tensor}
        now = tensor.view(heads, 3, 16, *tensor.shape[1:])
        order = (1, 0, 2) if version == 0 else (0, 2, 1)
        return {key: now.permute(*order, *range(3, now.dim())).reshape(tensor.shape).contiguous()}

    def change(content):
        in_layers(content, old)
        content["checkpoint_version"] = version
        if version == 0:
            del content["checkpoint_version"]

    rewrite(root, change)
    read_again(tmp_path)


def test_names_before_october_2023_under_transformer(tmp_path) -> None:
    root = written(tmp_path, "gpt2", Grid(2))

    def change(content):
        model = content["model"]["language_model"]
        in_layers(
            content,
            lambda key, tensor: {
                key.replace("input_norm", "input_layernorm")
                .replace("post_attention_norm", "post_attention_layernorm")
                .replace("final_norm", "final_layernorm")
                .replace("self_attention.", "attention."): tensor
            },
        )
        model["transformer"] = model.pop("encoder")

    rewrite(root, change)
    read_again(tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("model", "groups"), [("llama-gqa", 4), ("starcoder", 1)])
def test_query_apart_from_key_value(model, groups, ranks, tmp_path) -> None:
    """Legacy GQA: `query` (heads, width), `key_value` (groups, 2, width); one group lies on every rank alike."""
    root = written(tmp_path, model, Grid(1 if groups == 1 else ranks))
    heads, width = (8, 8) if groups == 4 else (4, 16)
    per, own = heads // groups, groups // ranks if groups > 1 else 1

    def apart(key, tensor):
        if "query_key_value" not in key:
            return {key: tensor}
        grouped = tensor.view(own, per + 2, width, *tensor.shape[1:])
        return {
            key.replace("query_key_value", "query"): grouped[:, :per].flatten(0, 2).contiguous(),
            key.replace("query_key_value", "key_value"): grouped[:, per:].flatten(0, 2).contiguous(),
        }

    rewrite(root, lambda content: in_layers(content, apart))
    read_again(tmp_path)


def test_gate_apart_from_up(tmp_path) -> None:
    root = written(tmp_path, "llama", Grid(2))

    def apart(key, tensor):
        if "dense_h_to_4h" not in key:
            return {key: tensor}
        gate, up = tensor.chunk(2)
        names = (key.replace("dense_h_to_4h", f"dense_h_to_4h_{number}") for number in (1, 2))
        return dict(zip(names, (gate.clone(), up.clone()), strict=True))

    rewrite(root, lambda content: in_layers(content, apart))
    read_again(tmp_path)


def test_contiguous_gate_is_warned_of_and_read(tmp_path) -> None:
    """Pai's gpt3_llama converter at TP 2: rank 0 holds the gate, rank 1 up, under the same names."""
    root = written(tmp_path, "llama", Grid(2))
    directories = sorted((root / "release").iterdir())
    contents = [content_of(directory / "model_optim_rng.pt") for directory in directories]
    for number in range(4):
        key = f"layers.{number}.mlp.dense_h_to_4h.weight"
        parts = [content["model"]["language_model"]["encoder"][key].chunk(2) for content in contents]
        for side, content in enumerate(contents):
            content["model"]["language_model"]["encoder"][key] = torch.cat([part[side] for part in parts])
    for directory, content in zip(directories, contents, strict=True):
        content["args"] = types.SimpleNamespace(num_attention_heads=4, hidden_size=64)
        torch.save(content, directory / "model_optim_rng.pt")
    wrong = plan(Request(root, tmp_path / "wrong", "hf"))
    assert "--contiguous-gate" in wrong.warnings[0]
    write(wrong)
    with pytest.raises(AssertionError, match=r"mlp\.(gate|up)_proj"):
        equal(tmp_path / "hf", tmp_path / "wrong")
    read_again(tmp_path, contiguous_gate=True)


def test_experts_in_one_tensor(tmp_path) -> None:
    """The old GroupedMLP: weight1 (H, experts * 2F) and weight2 (experts * F, H), each expert's transposed."""
    root = written(tmp_path, "mixtral", Grid(2, 1, 1, 2), names="local")

    def change(content):
        model = content["model"]
        for number in range(4):
            stem = f"decoder.layers.{number}.mlp.experts"
            first, second = (
                [model.pop(f"{stem}.local_experts.{expert}.linear_fc{matrix}.weight") for expert in (0, 1)] for matrix in (1, 2)
            )
            model[f"{stem}.weight1"] = torch.stack([matrix.t() for matrix in first]).reshape(64, -1).clone()
            model[f"{stem}.weight2"] = torch.cat([matrix.t() for matrix in second])

    rewrite(root, change)
    read_again(tmp_path)


def test_an_uneven_pipeline(tmp_path) -> None:
    """Layers count on from stage to stage, however many each has: here 3 and 1."""
    root = written(tmp_path, "llama", Grid(1, 2), names="local")
    files = [root / "release" / f"mp_rank_00_00{stage}" / "model_optim_rng.pt" for stage in (0, 1)]
    first, second = (content_of(file) for file in files)
    moved = [key for key in second["model"] if key.startswith("decoder.layers.0.")]
    for key in moved:
        first["model"][key.replace("layers.0.", "layers.2.")] = second["model"].pop(key)
    for key in [key for key in second["model"] if key.startswith("decoder.layers.1.")]:
        second["model"][key.replace("layers.1.", "layers.0.")] = second["model"].pop(key)
    for file, content in zip(files, (first, second), strict=True):
        torch.save(content, file)
    read_again(tmp_path)


def test_layernorm_1p(tmp_path) -> None:
    root = written(tmp_path, "gpt2", names="local")

    def change(content):
        content["args"].apply_layernorm_1p = True
        for key, tensor in content["model"].items():
            if "norm" in key and key.endswith(".weight"):
                content["model"][key] = tensor - 1

    rewrite(root, change)
    write(plan(Request(root, tmp_path / "back", "hf")))
    first, second = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    for key, tensor in first.items():
        assert torch.allclose(tensor, second[key], atol=1e-6, rtol=0), key


def test_optimizer_and_random_state_are_left_out_and_said(tmp_path) -> None:
    root = written(tmp_path, "llama", Grid(2), names="local")
    rewrite(root, lambda content: content.update(optimizer={"state": {0: torch.ones(3)}}, rng_state=[{"torch": torch.ones(2)}]))
    conversion = plan(Request(root, tmp_path / "back", "hf"))
    assert {"optimizer", "rng_state"} <= {line.split(": ")[1] for line in conversion.source.skipped if "model_optim" in line}
    write(conversion)
    equal(tmp_path / "hf", tmp_path / "back")


def test_one_iteration_named_itself(tmp_path) -> None:
    root = written(tmp_path, "llama")
    write(plan(Request(root / "release", tmp_path / "back", "hf")))
    equal(tmp_path / "hf", tmp_path / "back")


def test_a_tied_head_that_differs_is_refused(tmp_path) -> None:
    root = written(tmp_path, "qwen2-tied", Grid(1, 2), names="local")

    def change(content):
        if "output_layer.weight" in content["model"]:
            content["model"]["output_layer.weight"] = content["model"]["output_layer.weight"] + 1

    rewrite(root, change)
    with pytest.raises(DataError, match=r"output_layer\.weight: must be equal to .*word_embeddings\.weight"):
        write(plan(Request(root, tmp_path / "back", "hf")))
    assert not (tmp_path / "back").exists()


def test_a_bias_that_rms_norm_has_no_use_for_must_be_zero(tmp_path) -> None:
    root = written(tmp_path, "llama", names="local")
    for value, message in ((0.0, None), (0.5, r"final_layernorm\.bias: the family has no such bias, and this one is not zero")):
        rewrite(
            root,
            lambda content, value=value: content["model"].update({"decoder.final_layernorm.bias": torch.full((64,), value)}),
        )
        conversion = plan(Request(root, tmp_path / f"back{value}", "hf"))
        if message is None:
            write(conversion)
        else:
            with pytest.raises(DataError, match=message):
                write(conversion)


def test_old_uploads_without_their_prefix(tmp_path) -> None:
    from safetensors.torch import save_file

    build("gpt2", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    whole = load_file(file)
    save_file({key.removeprefix("transformer."): tensor for key, tensor in whole.items()}, file)
    write(plan(Request(tmp_path / "hf", tmp_path / "megatron", "megatron")))
    write(plan(Request(tmp_path / "megatron", tmp_path / "back", "hf")))
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(whole)
    assert all(torch.equal(back[key], whole[key]) for key in whole)


def test_pytorch_bin_shards(tmp_path) -> None:
    import json

    build("llama", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    names = sorted(tensors)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    halves = {"pytorch_model-1.bin": names[:20], "pytorch_model-2.bin": names[20:]}
    for file, keys in halves.items():
        torch.save({key: tensors[key] for key in keys}, old / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    write(plan(Request(old, tmp_path / "back", "hf")))
    equal(tmp_path / "back", tmp_path / "hf")


def test_args_of_a_namespace_are_kept(tmp_path) -> None:
    root = written(tmp_path, "llama-gqa", Grid(2, 2), names="transformer-engine")
    content = content_of(root / "release" / "mp_rank_00_000" / "model_optim_rng.pt")
    assert isinstance(content["args"], argparse.Namespace)
    told = vars(content["args"])
    assert (told["num_layers"], told["num_query_groups"], told["swiglu"], told["padded_vocab_size"]) == (4, 4, True, 256)
