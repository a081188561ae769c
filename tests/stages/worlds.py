"""The world the stages are tested in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import flags, run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.training.tiny import WORDS, write_tiny_model

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 10, "max_position_embeddings": 64, "initializer_range": 0.1,
         "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """model/, critic/ and rows of every kind, over a vocabulary of eight letters."""
    directory = tmp_path_factory.mktemp("world")
    write_tiny_model(directory, seed=0)
    generator = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (count,), generator=generator))

    sft = [{"prompt": words(2, 7), "completion": f" {words(1, 6)}"} for _ in range(37)]
    pairs = [{"prompt": words(2, 7), "chosen": f" a a {words(1, 5)}", "rejected": f" h {words(1, 5)}"} for _ in range(37)]
    prompts = [{"prompt": words(2, 7)} for _ in range(29)]
    good = {True: "chosen", False: "rejected"}
    rated = [
        {"prompt": pair["prompt"], "completion": pair[good[row % 3 > 0]], "label": row % 3 > 0}
        for row, pair in enumerate(pairs)
    ]
    for name, rows in (("sft", sft), ("pairs", pairs), ("rated", rated), ("prompts", prompts)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="session")
def llamas(world, tmp_path_factory) -> Path:
    """The tiny world with models whose layers are nn.Linear and whose sizes are multiples of 16."""
    directory = tmp_path_factory.mktemp("llamas")
    shutil.copytree(world, directory, dirs_exist_ok=True)
    torch.manual_seed(0)
    for part, model in (
        ("model", LlamaForCausalLM(LlamaConfig(**SIZES))),
        ("critic", LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))),
    ):
        (directory / part / "model.safetensors").unlink()
        model.save_pretrained(directory / part)
    return directory


CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}h {% endif %}"


@pytest.fixture(scope="session")
def chatty(llamas, tmp_path_factory) -> Path:
    """The tiny llama with a chat template of its words: what was said, and an h to begin a reply with."""
    directory = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(llamas / "model", directory)
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


@pytest.fixture(scope="session")
def reward(llamas, tmp_path_factory):
    """A reward model trained as an adapter on model/."""
    directory = tmp_path_factory.mktemp("reward")
    more = {"lora__rank": 3, "schedule__length": 3, "checkpoint__every": 0, "optimizer__lr": 1e-2, "data__eval": "null"}
    arguments = flags("rm", llamas, directory / "rm", **more)
    assert run("rm", arguments, directory / "log") == 0, (directory / "log").read_text()
    return directory / "rm"


STOP = 2 + WORDS.index("d")


@pytest.fixture(scope="session")
def models(llamas, tmp_path_factory) -> Path:
    """model/, worse/ (the same, much too sure of itself), uniform/ (every token as likely), other/ (another tokenizer),
    nan/ (one weight is none), short/ (eight positions), stops/ (a word, d, ends a reply, too)."""
    directory = tmp_path_factory.mktemp("models")
    for name, factor in (("model", 1.0), ("worse", 20.0), ("uniform", 0.0)):
        shutil.copytree(llamas / "model", directory / name)
        model = AutoModelForCausalLM.from_pretrained(llamas / "model")
        model.lm_head.weight.data *= factor
        model.save_pretrained(directory / name)
    shutil.copytree(llamas / "model", directory / "other")
    tokenizer = AutoTokenizer.from_pretrained(llamas / "model")
    tokenizer.add_tokens(["z"])
    tokenizer.save_pretrained(directory / "other")
    model = AutoModelForCausalLM.from_pretrained(llamas / "model")
    model.resize_token_embeddings(16)
    model.save_pretrained(directory / "other")
    for name in ("nan", "short", "stops"):
        shutil.copytree(llamas / "model", directory / name)
    model = AutoModelForCausalLM.from_pretrained(llamas / "model")
    model.config.max_position_embeddings = 8
    model.save_pretrained(directory / "short")
    model = AutoModelForCausalLM.from_pretrained(llamas / "model")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(directory / "nan")
    (directory / "stops" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, STOP], "pad_token_id": 0}))
    shutil.copytree(llamas / "critic", directory / "critic")
    for name in ("sft", "pairs", "prompts"):
        shutil.copy(llamas / f"{name}.jsonl", directory)
    rows = [
        {**row, "source": "web" if at % 3 else "book"}
        for at, row in enumerate(map(json.loads, (llamas / "pairs.jsonl").read_text().splitlines()))
    ]
    (directory / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
