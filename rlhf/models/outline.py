"""A model without its weights: the modules of a source on the meta device, made from its config alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.errors import DataError
from rlhf.models.load import local
from rlhf.models.source import Source, resolve


def outline(spec: str) -> nn.Module:
    """A policy or a reward model, with adapters where the source is an adapter.

    Raises:
        DataError: transformers knows no such architecture, or an adapter names no base.
    """
    source = local(resolve(spec))
    if (Path(source.path) / "adapter_config.json").is_file():
        return _with_adapter(Path(source.path))
    return _laid_out(source)


def _laid_out(source: Source, scalar: bool = False) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
        scalar = scalar or any("SequenceClassification" in name for name in config.architectures or ())
        if scalar:
            config.num_labels = 1
        factory = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        with torch.device("meta"):
            return factory.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{source.path}: cannot be laid out: {str(error).strip().splitlines()[0]}") from error


def _with_adapter(directory: Path) -> nn.Module:
    from peft import PeftConfig, PeftModel, TaskType  # five CPU seconds to import

    config = PeftConfig.from_pretrained(str(directory))
    if config.base_model_name_or_path is None:
        raise DataError(f"{directory}/adapter_config.json: no base_model_name_or_path, so its base is unknown")
    revision = f"@{config.revision}" if config.revision else ""
    base = local(resolve(f"{config.base_model_name_or_path}{revision}"))
    laid_out = _laid_out(base, scalar=config.task_type == TaskType.SEQ_CLS)
    return PeftModel(laid_out.requires_grad_(False), config)  # pyright: ignore
