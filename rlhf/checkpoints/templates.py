"""Names with holes: `model.layers.{layer}.mlp.{leaf}` stands for every layer's weight and bias, in both directions."""

from __future__ import annotations

import re
from functools import cache

HOLES = {"layer": r"\d+", "expert": r"\d+", "leaf": "weight|bias"}
"""What may stand in each hole."""

Values = dict[str, str]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    holes = [f"(?P<{part}>{HOLES[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)]
    return re.compile("".join(holes))


def match(template: str, name: str) -> Values | None:
    """What stands in the holes of the template, where the name is one of its."""
    found = _pattern(template).fullmatch(name)
    return found.groupdict() if found else None


def fill(template: str, values: Values) -> str:
    return template.format_map(values)


def piece(name: str) -> str:
    """A tensor's name with its layer and expert left open: what kind of tensor it is."""
    name = re.sub(r"(\.layers)\.\d+\.", r"\1.{layer}.", name)
    return re.sub(r"(\.experts)\.\d+\.", r"\1.{expert}.", name)
