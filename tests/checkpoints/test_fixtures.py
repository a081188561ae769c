"""Checkpoints that other tools wrote: to Hugging Face and back, equal to the bit, logits as transformers computed them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.layouts.torch_files import _flat
from rlhf.checkpoints.pickles import open_pt
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "megatron"
NAMES = (
    "bloom_pai051_legacy_tp1",
    "llama_gqa_mlm0161_torchdist_tp1",
    "llama_mha_mlm012conv_legacymodel_tp2pp2",
    "llama_mha_mlm0161_torch_tp2pp2",
    "llama_mha_mlm0161_torchdist_tp2pp2",
    "llama_mha_pai051_hf2te_tp2",
    "llama_mha_pai09_legacy_tp1pp1",
    "llama_mha_pai09_legacy_tp2pp2",
)
WITH_ARGS = [name for name in NAMES if "mlm" in name]
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no checkpoints of other tools at {FIXTURES}")


def equal(first: Path, second: Path) -> None:
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_to_hugging_face_and_back(name: str, tmp_path: Path) -> None:
    home = FIXTURES / name
    conversion = plan(Request(home / "megatron", tmp_path / "hf", "hf", config=home / "hf"))
    write(conversion)
    equal(tmp_path / "hf", home / "hf")
    assert verify(conversion).max_difference < 1e-5
    expected = load_file(home / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() < 1e-5
    for layout, grid in (("torch", Grid(2, 2)), ("torch_dist", Grid())):
        back = plan(Request(tmp_path / "hf", tmp_path / layout, "megatron", grid=grid, layout=layout))
        write(back)
        assert verify(back).max_difference < 1e-5
        write(plan(Request(tmp_path / layout, tmp_path / f"{layout}-hf", "hf")))
        equal(tmp_path / f"{layout}-hf", home / "hf")


@pytest.mark.parametrize("name", WITH_ARGS)
def test_a_config_is_made_where_there_is_none(name: str, tmp_path: Path) -> None:
    conversion = plan(Request(FIXTURES / name / "megatron", tmp_path / "hf", "hf"))
    write(conversion)
    equal(tmp_path / "hf", FIXTURES / name / "hf")
    assert verify(conversion, FIXTURES / name / "hf").max_difference < 1e-5


@pytest.mark.parametrize(
    ("name", "style", "grid"),
    [
        ("llama_mha_mlm0161_torch_tp2pp2", "local", Grid(2, 2)),
        ("llama_mha_mlm012conv_legacymodel_tp2pp2", "legacy", Grid(2, 2)),
    ],
)
def test_the_same_files_as_megatron(name: str, style: str, grid: Grid, tmp_path: Path) -> None:
    """Every rank's keys, and every tensor but for the rows of padding, which each tool fills as it likes."""
    write(plan(Request(FIXTURES / name / "hf", tmp_path / "m", "megatron", grid=grid, names=style)))
    theirs_root = next(path for path in (FIXTURES / name / "megatron").iterdir() if path.is_dir())
    for theirs_file in sorted(theirs_root.glob("*/model_optim_rng.pt")):
        ours = dict(_flat(open_pt(tmp_path / "m" / "release" / theirs_file.parent.name / theirs_file.name)["model"]))
        theirs = dict(_flat(open_pt(theirs_file)["model"]))
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            if tensor is None:
                assert ours[key] is None
            else:
                assert torch.equal(ours[key], tensor), key


def test_the_same_tensors_as_pai_for_transformer_engine(tmp_path: Path) -> None:
    home = FIXTURES / "llama_mha_pai051_hf2te_tp2"
    write(plan(Request(home / "hf", tmp_path / "te", "te", grid=Grid(2))))
    for rank in ("mp_rank_00", "mp_rank_01"):
        ours = dict(_flat(open_pt(tmp_path / "te" / "release" / rank / "model_optim_rng.pt")["model"]))
        theirs = dict(_flat(open_pt(home / "megatron" / "release" / rank / "model_rng.pt")["model"]))
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key
        left = {key for key in set(theirs) - set(ours) if not key.endswith(("layer_norm_bias", "final_layernorm.bias"))}
        assert left == {"lm_head.weight", "word_embeddings_for_head.weight"}  # Pai's copies of the head and the embedding


def test_the_same_metadata_as_megatron(tmp_path: Path) -> None:
    """The torch_dist files name the tensors, and their whole sizes, that Megatron's own do."""
    from rlhf.checkpoints.layouts.metadata import read_metadata

    home = FIXTURES / "llama_gqa_mlm0161_torchdist_tp1"
    write(plan(Request(home / "hf", tmp_path / "m", "megatron", layout="torch_dist")))
    ours = read_metadata(tmp_path / "m" / "iter_0000000" / ".metadata").tensors
    theirs = read_metadata(home / "megatron" / "iter_0000010" / ".metadata").tensors
    sizes = {key: tuple(getattr(about, "size", ())) for key, about in theirs.items() if not key.startswith("rng_state")}
    assert {key: tuple(getattr(about, "size", ())) for key, about in ours.items()} == sizes
