"""GGUF files (llama.cpp) as a model source: dequantised once into a Hugging Face directory in the cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from rlhf.digest import cache_directory, file_digest
from rlhf.errors import DataError


def converted(path: Path) -> Path:
    """The Hugging Face directory of a GGUF file's weights and tokenizer; made on first use, kept by the file's digest.

    Raises:
        DataError: the file is not GGUF, or transformers does not know its architecture, or the `gguf` extra is missing.
    """
    target = cache_directory() / "gguf" / file_digest(path)[:16]
    if target.is_dir():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except ImportError as error:
        raise DataError(f"{path}: reading GGUF needs the gguf package: pip install 'rlhf[gguf]'") from error
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(f"{path}: transformers cannot read this GGUF file: {error}") from error
    # save_pretrained refuses a model that remembers its quantisation, though its weights are plain tensors by now.
    delattr(model.config, "quantization_config")
    plain = type(model)._from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = tokenizer.eos_token_id
    partial = target.with_name(f".{target.name}-{os.getpid()}")
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if target.is_dir():
        shutil.rmtree(partial)  # another process was faster
    else:
        partial.rename(target)
    return target
