"""What a family of models is: a table of tensors, a table of sizes, and what Megatron says of such a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.checkpoints.operations import Operation

NOT_HERE = object()
ALSO = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
"""Keys of config.json that transformers renamed in some families: the one may stand for the other."""


@dataclass(frozen=True)
class Family:
    """One family, for reading and writing."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` in config.json; the first is the one that is written"""
    architecture: str
    """`architectures` in a config.json that is written"""
    tensors: Mapping[str, Operation]
    """our name (names.py) -> the Hugging Face tensors that make it"""
    sizes: Mapping[str, str]
    """our word for a size (Sizes) -> its key in config.json; `a.b` is a key inside a section"""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """sizes that its config.json may leave out"""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """what else a config.json that is written says"""
    args: Mapping[str, Any] = field(default_factory=dict)
    """what Megatron's args say of such a model; a checkpoint that says otherwise is of another family"""
    groups: Callable[[Mapping[str, Any]], int | None] | None = None
    """the number of key and value heads from a config.json, where no one key holds it"""
    as_groups: Callable[[int, int], Mapping[str, Any]] | None = None
    """the reverse: what a config.json says of so many heads and groups"""
    when: Callable[[Mapping[str, Any]], bool] | None = None
    """which config.json of this model_type is meant, where the table fits only some"""
    optional_prefix: str = ""
    """a prefix that old uploads leave out"""
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """keys of config.json that say whether there are biases, and the matrices they speak of; `constants` has their defaults.
    Without, `args` say it"""
    ignored: tuple[str, ...] = ()
    """Hugging Face tensors that hold no weights (names with holes)"""
    mapping_only: str = ""
    """why its logits cannot be compared here; empty where they can"""

    def size(self, config: Mapping[str, Any], name: str) -> Any:
        """A size by our word for it, from a config.json."""
        found: Any = config
        for key in self.sizes[name].split(".") if name in self.sizes else ():
            found = found.get(key, found.get(ALSO.get(key), NOT_HERE)) if isinstance(found, Mapping) else NOT_HERE
        return self.defaults.get(name) if found is NOT_HERE or found is config else found
