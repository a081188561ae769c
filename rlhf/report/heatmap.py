"""A table of numbers as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

ROW_HEIGHT = 0.22
"""Inches."""


def draw(
    path: Path, values: Mapping[str, Mapping[str, float]], columns: Sequence[str], title: str, low: float, high: float
) -> None:
    """A PNG with a row for each name; `low` and worse is dark red, `high` and better is green, what is not there is blank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import; only those who draw pay
    from matplotlib.figure import Figure

    cells = [[row.get(column, float("nan")) for column in columns] for row in values.values()]
    figure = Figure(figsize=(3.5 + 1.1 * len(columns), 1.4 + ROW_HEIGHT * len(cells)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(cells, aspect="auto", cmap="RdYlGn", vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(cells)), list(values), fontsize=7)
    for row, cell in ((r, c) for r in range(len(cells)) for c in range(len(columns))):
        if cells[row][cell] == cells[row][cell]:
            axes.text(cell, row, f"{cells[row][cell]:.1f}", ha="center", va="center", fontsize=7)
    axes.set_title(title, fontsize=9)
    figure.colorbar(picture, label="dB")
    FigureCanvasAgg(figure).print_png(path)
