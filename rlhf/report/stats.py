"""Numbers of one step, gathered as sums so that their means are right however a batch was split."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

Number = float | int | Tensor


class Stats:
    """Sums with counts, and maxima. Tensors are only fetched from their device when the means are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Number, Number]] = {}
        self.maxima: dict[str, Number] = {}

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        old_total, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_total + total, old_count + count)

    def add_all(self, values: Mapping[str, Tensor], count: Number) -> None:
        """Sums over `count` things each; what is named max_... is a maximum."""
        for name, value in values.items():
            if name.rpartition("/")[2].startswith("max_"):
                self.maximum(name, value)
            else:
                self.add(name, value, count)

    def maximum(self, name: str, value: Number) -> None:
        value, old = float(value), float(self.maxima.get(name, value))
        self.maxima[name] = value if value > old or math.isnan(value) else old

    def put(self, values: Mapping[str, float]) -> None:
        """Values that are already means over all ranks."""
        for name, value in values.items():
            self.sums[name] = (value, 1.0)

    def absorb(self, other: Stats) -> None:
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)
        for name, value in other.maxima.items():
            self.maximum(name, value)

    def plain(self) -> Stats:
        """The same with Python floats, ready to be sent to another process."""
        plain = Stats()
        plain.sums = {name: (float(total), float(count)) for name, (total, count) in self.sums.items()}
        plain.maxima = {name: float(value) for name, value in self.maxima.items()}
        return plain

    @classmethod
    def merged(cls, parts: Iterable[Stats]) -> Stats:
        whole = cls()
        for part in parts:
            whole.absorb(part)
        return whole

    def means(self) -> dict[str, float]:
        """Sorted by name; a mean over nothing is left out."""
        plain = self.plain()
        means = {name: total / count for name, (total, count) in plain.sums.items() if count}  # pyright: ignore
        return dict(sorted((means | plain.maxima).items()))  # pyright: ignore[reportReturnType]
