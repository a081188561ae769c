"""Megatron checkpoints as a model source: converted once into a Hugging Face directory in the cache, and proven."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from rlhf.checkpoints.convert import Conversion, Request, plan
from rlhf.checkpoints.writing import write
from rlhf.digest import cache_directory, file_digest, text_digest
from rlhf.errors import CheckFailed, DataError

CONVERTER = 1
"""Goes up when the same checkpoint becomes another model: what an older converter left in the cache is not taken then."""


def converted(path: Path) -> Path:
    """The Hugging Face directory of a Megatron checkpoint; made on first use, kept by the digest of what it was made from.

    Raises:
        DataError: the checkpoint cannot be converted, or the result does not compute what its source does.
    """
    conversion = plan(Request(path, cache_directory() / "megatron", "hf"))
    target = conversion.request.destination / _key(conversion)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):  # several processes of one run ask at once
        if not target.is_dir():
            _convert(conversion, target)
    return target


def _key(conversion: Conversion) -> str:
    """All that the result is made of: weights and what describes them, config.json as it will be, tokenizer, our own code."""
    source = conversion.request.source
    weights = {os.path.relpath(file, source): file_digest(file) for file in conversion.source.files}
    beside = {file.name: file_digest(file) for file in conversion.carried}
    return text_digest(json.dumps([CONVERTER, weights, conversion.target.texts, beside]))[:16]


def _convert(conversion: Conversion, target: Path) -> None:
    from rlhf.checkpoints.verify import verify

    # Under its final name there is only what has been proven, whenever a kill comes.
    unproven = target.with_name(f"{target.name}-unproven")
    if unproven.exists():
        shutil.rmtree(unproven)
    conversion = replace(conversion, request=replace(conversion.request, destination=unproven))
    try:
        write(conversion)
        verify(conversion)
        unproven.rename(target)
    except CheckFailed as error:
        raise DataError(f"{conversion.request.source}: converted, but {error}; `rlhf convert --verify` shows more") from error
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
