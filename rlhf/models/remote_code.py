"""Python files that come with a model (`auto_map` in its config.json): never run unless a run asks for it, and then pinned.

What is run is pinned by content: of a directory the run's manifest holds the digest of every file, of a Hub model the revision
is a commit. Code that a model names in another repository has neither, and so is refused always.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from rlhf.errors import DataError
from rlhf.models.source import Source, require_pinned

BESIDE = re.compile(r"\w+\.\w+")
"""A class in a file that lies beside config.json: `modeling_x.XForCausalLM`."""


def check_remote_code(source: Source, trusted: bool) -> None:
    """Raises DataError where code is to be run that is not pinned with the model; ConfigError where the model is not."""
    if not trusted:
        return
    require_pinned(source)
    for reference in _references(source):
        if not BESIDE.fullmatch(reference):
            raise DataError(
                f"{source.path}: its auto_map names {reference}, which does not lie beside the weights and so is not pinned; "
                "copy that file into the model's directory and name it there"
            )


def refused(source: Source, error: Exception) -> DataError | None:
    """Our words for what transformers says of a model that cannot be opened without code of its own."""
    if "trust_remote_code" not in str(error):
        return None
    return DataError(
        f"{source.path}: this model brings Python code of its own, which is not run: transformers knows no model of its kind. "
        "Read the .py files beside its config.json; if you trust them, start sft, rm, ppo, generate or eval with "
        "--trust-remote-code (a Hub model must then be pinned to a commit: owner/name@40 hex digits)"
    )


def _references(source: Source) -> list[str]:
    options: dict[str, Any] = {"revision": source.revision} if source.revision else {}
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.path, **options)
        maps = [config.get("auto_map"), get_tokenizer_config(source.path, **options).get("auto_map")]
    except (OSError, ValueError):
        return []  # opening it says what is wrong
    return [str(reference) for found in maps for reference in _leaves(found) if reference is not None]


def _leaves(value: Any) -> list[Any]:
    """A tokenizer's entry is a pair: a slow class and a fast one."""
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list) else [value]
