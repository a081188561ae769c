"""A small Llama and some rows, for the FP8 commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<|pad|>", "<|end|>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="session")
def subject_files(tmp_path_factory) -> Path:
    """model/ and rows.jsonl: the reply to some letters is the same letters, backwards."""
    directory = tmp_path_factory.mktemp("subject")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=32, max_position_embeddings=64, initializer_range=0.1,
                         bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=WORDS[0], eos_token=WORDS[1]).save_pretrained(
        directory / "model"
    )
    letters = [[WORDS[int(i)] for i in torch.randint(2, 28, (int(torch.randint(3, 9, ())),))] for _ in range(120)]
    rows = [{"prompt": " ".join(row), "completion": " " + " ".join(reversed(row))} for row in letters]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
