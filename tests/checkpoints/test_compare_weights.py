"""`rlhf compare` of a Megatron checkpoint: by the names of Hugging Face, and a tensor that was changed is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rewrite import Models, copied, edit, rewrite
from safetensors.torch import load_file, save_file
from test_fixtures import FIXTURES, NAMES

from rlhf.cli import main

with_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no checkpoints of other tools at {FIXTURES}")


def compare(one: Path, other: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    capsys.readouterr()  # DeepSpeed says something where it is imported first, by transformers as it saves a model
    code = main(["compare", str(one), str(other), *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@with_fixtures
@pytest.mark.parametrize("name", NAMES)
def test_what_other_tools_wrote_is_the_model_it_was_made_of(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = FIXTURES / name
    code, found = compare(home / "megatron", home / "hf", capsys=capsys)
    assert (code, found["differing"]) == (0, [])
    assert found["tensors"] == found["equal_tensors"] > 10
    tensors = load_file(home / "hf" / "model.safetensors")
    changed = sorted(tensors)[7]
    tensors[changed].view(-1)[0] += 0.5
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hf" / "config.json").write_bytes((home / "hf" / "config.json").read_bytes())
    code, found = compare(tmp_path / "hf", home / "megatron", capsys=capsys)
    assert (code, [part["name"] for part in found["differing"]]) == (1, [changed])
    assert found["differing"][0]["largest"] == pytest.approx(0.5)


@with_fixtures
def test_two_layouts_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Other ranks, other names, other files: no config.json tells more than they do."""
    one, other = (
        FIXTURES / name / "megatron" for name in ("llama_mha_mlm0161_torchdist_tp2pp2", "llama_mha_pai09_legacy_tp1pp1")
    )
    code, found = compare(one, other, capsys=capsys)
    assert (code, found["differing"], found["equal_tensors"]) == (0, [], 39)
    assert main(["compare", str(one), str(other), "--config", str(FIXTURES / "llama_gqa_mlm0161_torchdist_tp1" / "hf")]) == 65
    assert "args.num_attention_heads is 4, config.json says 8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-tied"])
def test_rows_of_one_matrix_on_one_rank(name: str, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fused matrix of query, key and value is three by their names; the last of its rows are values."""
    copy = copied(models, tmp_path, name, 2, "local")
    assert compare(copy, tmp_path / "hf", capsys=capsys)[0] == 0

    def moved(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.clone()
        rows[-1, 0] += 0.25
        return rows

    rewrite(copy, edit("decoder.layers.2.self_attention.linear_qkv.weight", moved), "*_01")
    code, found = compare(copy, tmp_path / "hf", capsys=capsys)
    assert (code, [part["name"] for part in found["differing"]]) == (1, ["model.layers.2.self_attn.v_proj.weight"])
    assert found["differing"][0]["largest"] == pytest.approx(0.25)


def test_another_model_is_an_error_that_says_so(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copied(models, tmp_path, "llama", 1, "local")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8, "num_key_value_heads": 8}))
    assert main(["compare", str(copy), str(tmp_path / "hf")]) == 65
    assert "is it the config of this model?" in capsys.readouterr().err
