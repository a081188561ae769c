"""A tiny random model, its tokenizer and some prompts, for testing PPO without any model or data of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf.data.order import shuffled
from rlhf.models.save import save_model

PAD, END = "<|pad|>", "<|end|>"
WORDS = list("abcdefgh")
QUESTIONS = (
    "What is the capital of France?",
    "Tell me a story about a cat.",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Name three kinds of trees.",
    "What should I read this summer?",
    "Explain how a bicycle works.",
    "Write a line about the sea.",
)


def write_tiny_model(directory: Path, seed: int) -> None:
    """model/ and critic/: a GPT-2 of two layers over ten tokens, and one with a scalar head.

    Their weights are large for a random start, so that log-probabilities differ visibly from one another; with the usual 0.02
    every token is equally likely and few mistakes show.
    """
    vocabulary = {word: index for index, word in enumerate([PAD, END, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1,
        bos_token_id=None, eos_token_id=vocabulary[END], pad_token_id=vocabulary[PAD],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        critic = GPT2ForSequenceClassification(GPT2Config.from_dict({**config.to_dict(), "num_labels": 1}))
    for part, module in (("model", model), ("critic", critic)):
        save_model(module, directory / part, tokenizer)


def write_prompts(path: Path, tiny: bool) -> None:
    """Prompts of different lengths, so that there are pads to get wrong."""
    prompts = (
        [" ".join(WORDS[i] for i in shuffled(8, seed)[: 2 + seed % 6]) for seed in range(128)] if tiny else list(QUESTIONS) * 8
    )
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
