"""Families of models: how each names its tensors in Hugging Face files, and its sizes in config.json.

Every other module of this folder is one family: a table called FAMILY, read in both directions. A new family is a new module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from rlhf.checkpoints.family import Family
from rlhf.errors import DataError


@cache
def families() -> dict[str, Family]:
    """All of them, by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.FAMILY.name: module.FAMILY for module in modules}


def of_config(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; None where none claims it."""
    claims = (family for family in families().values() if config.get("model_type") in family.model_types)
    return next((family for family in claims if family.when is None or family.when(config)), None)


def named(name: str) -> Family:
    """The family a user names.

    Raises:
        DataError: there is none of this name.
    """
    if name not in families():
        raise DataError(f"--family {name}: there is no such family; there are {', '.join(sorted(families()))}")
    return families()[name]
