"""Configuration: the schema, files and flags read into it. Imports pydantic and yaml, never torch."""

from __future__ import annotations

from rlhf.config.load import find_config, load, to_json
from rlhf.config.parse import Invocation, help_text, parse

__all__ = ["Invocation", "find_config", "help_text", "load", "parse", "to_json"]
