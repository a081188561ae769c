"""A model laid out without its weights has the modules of the model itself."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.config.sections import Fp8, Lora
from rlhf.errors import DataError
from rlhf.fp8.plan import plan
from rlhf.models.lora import add_lora
from rlhf.models.outline import outline
from rlhf.models.source import Source

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 48}  # fmt: skip


@pytest.fixture
def models(tmp_path):
    config = LlamaConfig(**SIZES)
    made = {
        "policy": LlamaForCausalLM(config),
        "tied": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "reward": LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    base = Source("directory", str(tmp_path / "policy"), None, None)
    for name, scalar in (("adapter", False), ("reward adapter", True)):
        trunk = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)) if scalar else LlamaForCausalLM(config)
        trunk.name_or_path = base.path
        made[name] = add_lora(trunk, base, Lora(rank=4), scalar, 0)
        made[name].save_pretrained(tmp_path / name)
    return made


@pytest.mark.parametrize("name", ["policy", "tied", "reward", "adapter", "reward adapter"])
def test_the_plan_is_that_of_the_model(name, models, tmp_path):
    for weights in tmp_path.rglob("*.safetensors"):
        weights.write_bytes(b"")  # nothing there may be read
    laid_out = outline(str(tmp_path / name))
    assert all(p.device == torch.device("meta") for p in laid_out.parameters())
    fp8 = Fp8(recipe="block", keep_last=1)
    assert plan(laid_out, fp8) == plan(models[name], fp8)
    assert sum(one.in_fp8 for one in plan(laid_out, fp8)) == 7


def test_an_adapter_without_a_base_and_an_unknown_architecture(models, tmp_path):
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(DataError, match="no base_model_name_or_path"):
        outline(str(tmp_path / "adapter"))
    (tmp_path / "policy" / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(DataError, match="cannot be laid out"):
        outline(str(tmp_path / "policy"))
