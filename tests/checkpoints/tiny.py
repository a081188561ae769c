"""Tiny random models of every family, as Hugging Face directories: norms and biases random too, so that a swap shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = SMALL | {"intermediate_size": 96, "num_key_value_heads": 4}
MOE = SMALL | {"num_key_value_heads": 4, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 32, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}

NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-gqa": ("llama", LLAMA | {"num_attention_heads": 8, "head_dim": 8}),
    "llama-bias-tied": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": (
        "llama",
        LLAMA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "mistral": ("mistral", LLAMA | {"head_dim": 16, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}),
    "mixtral": ("mixtral", MOE | {"intermediate_size": 96, "num_local_experts": 4}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-tied": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "qwen2_moe",
        MOE | {"intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts": 4},
    ),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", MOE | {"head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4}),
    "falcon-40b": ("falcon", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 4, "ffn_hidden_size": 256}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 4, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("opt", SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64, "pad_token_id": 0}),
    "starcoder-heads": ("gpt_bigcode", GPT2 | {"multi_query": False}),
    "starcoder2": ("starcoder2", LLAMA),
    "gpt2": ("gpt2", GPT2),
    "gpt2-exact": ("gpt2", GPT2 | {"activation_function": "gelu"}),
}
"""Models whose attention divides by four ranks."""

ONE_GROUP: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-7b": ("falcon", SMALL | {"multi_query": True, "ffn_hidden_size": 256}),
    "starcoder": ("gpt_bigcode", GPT2 | {"multi_query": True}),
}
"""Models with one key and value for all queries."""


def build(name: str, directory: Path, seed: int = 0, **others: Any) -> PreTrainedModel:
    """A random model in float32, saved; `others` are settings that differ."""
    model_type, changes = (NATIVE | ONE_GROUP)[name]
    changes = changes | others
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(directory)
    return model
