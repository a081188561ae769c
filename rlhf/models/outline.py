"""A model without its weights: the modules of a source on the meta device, made from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.errors import DataError
from rlhf.models.load import Loading, finish, local, without_dropout
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


def outline_to_train(spec: str, scalar: bool, loading: Loading) -> PreTrainedModel:
    """As a stage opens it: without dropout, adapters merged into their base, with a scalar head where one is wanted.

    Raises:
        DataError: transformers knows no such architecture, or there is no such model.
    """
    source = local(resolve(spec))
    if (Path(source.path) / "adapter_config.json").is_file():
        source = _base_of(Path(source.path))[0]
    model = _laid_out(source, scalar, dtype=loading.dtype, attn_implementation=loading.attention)
    return finish(model, loading)  # pyright: ignore[reportArgumentType]


def _laid_out(source: Source, scalar: bool | None = None, **settings: Any) -> nn.Module:
    """`scalar`: None, as its config says."""
    try:
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
        config = without_dropout(config) if settings else config
        if scalar is None:
            scalar = any("SequenceClassification" in name for name in config.architectures or ())
        if scalar:
            config.num_labels = 1
        factory = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        with torch.device("meta"):
            return factory.from_config(config, trust_remote_code=False, **settings)
    except (OSError, ValueError) as error:
        raise DataError(f"{source.path}: cannot be laid out: {str(error).strip().splitlines()[0]}") from error


def _base_of(directory: Path) -> tuple[Source, Any]:
    """An adapter's base, and the adapter's PeftConfig."""
    from peft import PeftConfig  # five CPU seconds to import

    config = PeftConfig.from_pretrained(str(directory))
    if config.base_model_name_or_path is None:
        raise DataError(f"{directory}/adapter_config.json: no base_model_name_or_path, so its base is unknown")
    revision = f"@{config.revision}" if config.revision else ""
    return local(resolve(f"{config.base_model_name_or_path}{revision}")), config


def _with_adapter(directory: Path) -> nn.Module:
    from peft import PeftModel, TaskType

    base, config = _base_of(directory)
    laid_out = _laid_out(base, scalar=True if config.task_type == TaskType.SEQ_CLS else None)
    return PeftModel(laid_out.requires_grad_(False), config)  # pyright: ignore
