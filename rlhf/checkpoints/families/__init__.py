"""Families of models: how each names its tensors in Hugging Face files, and its sizes in config.json.

Every other module of this folder is one family: a table called FAMILY, read in both directions. A new family is a new module.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from rlhf.checkpoints.family import Family
from rlhf.errors import DataError


@cache
def families() -> dict[str, Family]:
    """All of them, by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {module.FAMILY.name: module.FAMILY for module in modules}


def of_model_type(model_type: str) -> Family | None:
    """The family of a config.json's model_type; None where several or none claim it."""
    found = [family for family in families().values() if model_type in family.model_types]
    return found[0] if len(found) == 1 else None


def named(name: str) -> Family:
    """The family a user names.

    Raises:
        DataError: there is none of this name.
    """
    if name not in families():
        raise DataError(f"--family {name}: there is no such family; there are {', '.join(sorted(families()))}")
    return families()[name]
