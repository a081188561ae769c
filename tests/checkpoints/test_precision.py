"""FP8 weights with block factors: BF16 and back, against values computed one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.fp8_weights import dequantised, quantised
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.config.sections import Fp8
from rlhf.errors import CheckFailed, DataError
from rlhf.fp8.linear import FP8Linear
from rlhf.fp8.recipes import recipe_of

MOE = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 128}
QWEN2_MOE = {"hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
LLAMA = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200), (1, 1), (127, 129), (300, 64)])
def test_a_weight_is_its_code_times_the_factor_of_its_block(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(math.ceil(shape[0] / 128), math.ceil(shape[1] / 128), generator=generator)
    weights = dequantised(codes, scales)
    assert weights.dtype == torch.bfloat16
    for row in range(0, shape[0], 43):
        for column in range(0, shape[1], 37):
            exact = codes[row, column].double() * scales[row // 128, column // 128].double()
            assert weights[row, column] == exact.float().bfloat16()


def test_there_and_back() -> None:
    """Half a step of E4M3 (3 bits of mantissa: 1/16 of the value, or of the smallest normal) bounds the error.

    A factor is the least power of two that brings its block to 448 at most; BF16 holds code times factor exactly.
    """
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)) * 3
    weight[:128, :128] = 0
    codes, scales = quantised(weight)
    assert scales.shape == (2, 3)
    back = codes.float() * scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    step = torch.maximum(weight.abs() / 16, 2**-10 * scales.max())
    assert ((back - weight).abs() <= step).all()
    for row in range(2):
        for column in range(3):
            block = weight[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128].abs().max()
            assert scales[row, column] == (2.0 ** math.ceil(math.log2(block / 448)) if block else 1)
    assert torch.equal(dequantised(codes, scales).float(), back)


def test_a_layer_in_recipe_block_computes_with_what_is_stored() -> None:
    """So a model trained in it loses nothing; the recipe `rowwise` shows that this could fail."""
    linear = nn.Linear(256, 384, bias=False)
    codes, scales = quantised(linear.weight.detach())
    stored = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    for recipe, same in (("block", True), ("rowwise", False)):
        used = FP8Linear(linear, recipe_of(Fp8(recipe=recipe))).quantized_weight("fprop").dequantized()
        assert torch.equal(used, stored) is same


def test_a_factor_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"do not take \(1, 1\) factors"):
        dequantised(torch.zeros(130, 130).to(torch.float8_e4m3fn), torch.ones(1, 1))


def test_a_directory_to_fp8_and_to_bf16(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path / "hf", **MOE)
    write(plan(Request(tmp_path / "hf", tmp_path / "fp8", "fp8")))
    codes = load_file(tmp_path / "fp8" / "model.safetensors")
    assert codes["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert codes["model.layers.0.self_attn.q_proj.weight_scale_inv"].dtype == torch.float32
    assert codes["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["weight_block_size"] == [128, 128]
    conversion = plan(Request(tmp_path / "fp8", tmp_path / "bf16", "bf16"))
    write(conversion)
    plain = load_file(tmp_path / "bf16" / "model.safetensors")
    assert not any(key.endswith("_scale_inv") for key in plain)
    first = plain["model.layers.0.self_attn.q_proj.weight"]
    factor = codes["model.layers.0.self_attn.q_proj.weight_scale_inv"].item()
    assert torch.equal(first, (codes["model.layers.0.self_attn.q_proj.weight"].float() * factor).bfloat16())
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert verify(conversion, tmp_path / "bf16").max_difference == 0
    with pytest.raises(CheckFailed, match="--reference"):
        verify(conversion)
    with pytest.raises(CheckFailed, match="not the same model"):
        verify(conversion, tmp_path / "hf")


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("q_proj.weight_scale_inv", r"q_proj\.weight: is FP8, and .*_scale_inv is missing"),
        ("q_proj.weight", "weight it belongs"),
    ],
)
def test_half_of_a_pair_is_refused(tmp_path: Path, drop: str, message: str) -> None:
    build("llama", tmp_path / "hf", **LLAMA)
    write(plan(Request(tmp_path / "hf", tmp_path / "fp8", "fp8")))
    file = tmp_path / "fp8" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.self_attn.{drop}"]
    save_file(tensors, file)
    with pytest.raises(DataError, match=message):
        plan(Request(tmp_path / "fp8", tmp_path / "bf16", "bf16"))


def test_factors_of_a_weight_in_another_format_are_refused(tmp_path: Path) -> None:
    build("llama", tmp_path / "hf", **LLAMA)
    write(plan(Request(tmp_path / "hf", tmp_path / "fp8", "fp8")))
    file = tmp_path / "fp8" / "model.safetensors"
    assert plan(Request(tmp_path / "fp8", tmp_path / "bf16", "bf16"))
    for other in (torch.float8_e5m2, torch.bfloat16):
        tensors = load_file(file)
        key = "model.layers.1.self_attn.q_proj.weight"
        save_file(tensors | {key: tensors[key].float().to(other)}, file)
        with pytest.raises(DataError, match=rf"q_proj\.weight_scale_inv: factors of a weight in {other}"):
            plan(Request(tmp_path / "fp8", tmp_path / "bf16", "bf16"))


def test_what_stays_as_it_is_is_listed(tmp_path: Path) -> None:
    build("qwen2_moe", tmp_path / "hf", **QWEN2_MOE)
    config = plan(Request(tmp_path / "hf", tmp_path / "fp8", "fp8")).config
    kept = {"model.embed_tokens", "lm_head"}
    kept |= {f"model.layers.{layer}.mlp.{gate}" for layer in range(4) for gate in ("gate", "shared_expert_gate")}
    assert set(config["quantization_config"]["modules_to_not_convert"]) == kept


def test_nothing_in_fp8_is_said(tmp_path: Path) -> None:
    build("llama", tmp_path / "hf")
    with pytest.raises(DataError, match="there is nothing to do"):
        plan(Request(tmp_path / "hf", tmp_path / "bf16", "bf16"))


@pytest.mark.parametrize(
    ("name", "sizes", "kept"),
    [
        ("llama", LLAMA, set()),
        ("llama", LLAMA | {"intermediate_size": 192}, {"gate_proj", "up_proj", "down_proj"}),
        ("llama", LLAMA | {"num_key_value_heads": 2}, {"q_proj", "k_proj", "v_proj"}),
        ("qwen3_moe", MOE, {"gate"}),
        ("qwen3_moe", MOE | {"moe_intermediate_size": 64}, {"gate", "experts"}),
    ],
)
def test_transformers_reads_the_very_numbers(tmp_path: Path, name: str, sizes: dict[str, int], kept: set[str]) -> None:
    """Blocks that are not whole would be read wrongly (192 rows as two blocks of 96), so those matrices stay."""
    original = build(name, tmp_path / "hf", **sizes).state_dict()
    write(plan(Request(tmp_path / "hf", tmp_path / "fp8", "fp8")))
    about = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert about["modules_to_not_convert"] == about["ignored_layers"]
    assert {place.rpartition(".")[2] for place in about["ignored_layers"]} == kept | {"embed_tokens", "lm_head"}
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    checked = 0
    for key, weight in opened.state_dict().items():
        if key + "_scale_inv" in stored:
            factors = stored[key + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            assert torch.equal(weight, stored[key].float() * factors), key
            assert 0 < (weight - original[key]).abs().max() <= original[key].abs().max() / 16
            checked += 1
        elif key in stored:
            assert torch.equal(weight, original[key]), key
    assert checked == sum(key.endswith("_scale_inv") and "experts" not in key for key in stored) > 0


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("llama", {}, "no matrix inside the layers is a multiple of 128 x 128"),
        ("gpt2", {}, "gpt2 holds its matrices transposed"),
    ],
)
def test_what_no_engine_reads_is_not_written(tmp_path: Path, name: str, sizes: dict[str, int], message: str) -> None:
    build(name, tmp_path / "hf", **sizes)
    with pytest.raises(DataError, match=message):
        plan(Request(tmp_path / "hf", tmp_path / "fp8", "fp8"))


def test_codes_are_not_coded_again(tmp_path: Path) -> None:
    build("llama", tmp_path / "hf", **LLAMA)
    write(plan(Request(tmp_path / "hf", tmp_path / "fp8", "fp8")))
    with pytest.raises(DataError, match="is FP8 already"):
        plan(Request(tmp_path / "fp8", tmp_path / "again", "fp8"))
