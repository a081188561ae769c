"""The quickstart's model directory without weights: a tiny Llama's config, a byte-level BPE tokenizer, a chat template.

Plain files that transformers loads as they are; the weights are drawn by the SFT stage. Writing needs `tokenizers`
only, which is imported late: planning a quickstart must stay quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = [PAD, USER, ASSISTANT, END]

# The byte alphabet takes 256 of these, the special tokens 4; the merges left give most words one or two tokens.
VOCABULARY_SIZE = 512
# The longest prompt and reply of the chat world together are under 50 tokens.
CONTEXT_LENGTH = 128

# No BOS: the role token opens the sequence. Only replies end, so that END is what a reply is trained to stop with.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] }}
{{- '<|end|>' if message['role'] == 'assistant' }}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt }}
"""

MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index(END),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "dtype": "float32",
}

TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END,
    "pad_token": PAD,
    "padding_side": "left",
    "model_max_length": CONTEXT_LENGTH,
    "clean_up_tokenization_spaces": False,
}

GENERATION_CONFIG: dict[str, Any] = {
    "eos_token_id": SPECIAL_TOKENS.index(END),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "max_new_tokens": 40,
}


def write_base(directory: Path, texts: Iterable[str]) -> None:
    """Write the model directory, its tokenizer trained on `texts`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "tokenizer.json", train_tokenizer(texts))
    write_text(directory / "chat_template.jinja", CHAT_TEMPLATE)
    for name, content in (
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("config.json", MODEL_CONFIG),
    ):
        write_text(directory / name, json.dumps(content, indent=2) + "\n")


def train_tokenizer(texts: Iterable[str]) -> str:
    """Train a byte-level BPE on `texts` and return its tokenizer.json; decoding gives every text back exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, with the same bytes on every system."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)
