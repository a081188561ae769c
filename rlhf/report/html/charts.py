"""Numbers to the coordinates of small pictures; the template draws them as SVG, so that text and colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 24
"""Margins, in the units of the picture, which are about pixels of a phone."""

MOST_POINTS = 240
"""More of them are averaged in groups: a page of long runs stays small, and a noisy curve readable."""
FEW_POINTS = 16
"""Up to as many are drawn as dots as well: a line alone hides that there are only two."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    name: str
    path: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bars: list[tuple[float, float, float, float, int]] = field(default_factory=list)
    """x, y, width, height, number of the series."""
    names: list[str] = field(default_factory=list)
    limit: float | None = None
    """Height of a dashed line: a budget, a target."""


def curves(title: str, note: str, series: dict[str, Points], limit: float | None = None) -> Chart | None:
    """Lines over steps; None where there is no more than one step to draw."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    drawn = {name: averaged(points, MOST_POINTS) for name, points in finite.items() if points}
    every = [point for points in drawn.values() for point in points]
    steps = [x for x, _ in every]
    if len(set(steps)) < 2:
        return None
    inside = [x for x in ticks(steps) if min(steps) <= x <= max(steps)]
    y_axis = ticks([y for _, y in every] + ([limit] if limit is not None else []))
    return _chart(title, note, drawn, inside, y_axis, limit, (min(steps), max(steps)))


def _chart(
    title: str,
    note: str,
    drawn: dict[str, Points],
    x_axis: list[float],
    y_axis: list[float],
    limit: float | None,
    ends: tuple[float, float] | None = None,
) -> Chart:
    """`ends`: of the x axis, where they are not the first and the last tick."""
    across, up = _scales(ends or x_axis, y_axis)
    lines = []
    for name, points in drawn.items():
        placed = [(across(x), up(y)) for x, y in points]
        path = "M" + "L".join(f"{x} {y}" for x, y in placed)
        lines.append(Line(name, path, placed if len(placed) <= FEW_POINTS else []))
    return Chart(
        title,
        note,
        lines,
        [Tick(across(x), f"{x:,g}") for x in x_axis],
        [Tick(up(y), f"{y:.3g}") for y in y_axis],
        names=list(drawn),
        limit=None if limit is None else up(limit),
    )


def calibration(points: Points) -> Chart | None:
    """How often it was right against how sure it was; on the diagonal the two are the same."""
    if not points:
        return None
    axis = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    low = min(0.5, math.floor(10 * min(y for _, y in points)) / 10)
    upward = ticks([low, 1.0])
    drawn: dict[str, Points] = {"observed": points, "ideal": [(0.5, 0.5), (1.0, 1.0)]}
    return _chart("Calibration", "share of right answers, by how sure the model was", drawn, axis, upward, None)


def histogram(title: str, note: str, series: Mapping[str, Sequence[float]], bins: int = 12) -> Chart | None:
    """Counts of each series side by side in common bins; None where there is nothing to count."""
    values = {name: [value for value in found if math.isfinite(value)] for name, found in series.items()}
    values = {name: found for name, found in values.items() if found}
    if not values:
        return None
    low, high = min(min(found) for found in values.values()), max(max(found) for found in values.values())
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = (high - low) / bins
    counts = {name: [0] * bins for name in values}
    for name, found in values.items():
        for value in found:
            counts[name][min(bins - 1, int((value - low) / step))] += 1
    most = max(max(count) for count in counts.values())
    x_axis, y_axis = [low, (low + high) / 2, high], sorted({0, math.ceil(most / 2), most})
    across, up = _scales(x_axis, [float(y) for y in y_axis])
    width = (across(high) - across(low)) / bins / len(counts)
    bars = [
        (across(low + place * step) + number * width, up(count), width * 0.9, up(0) - up(count), number)
        for number, found in enumerate(counts.values())
        for place, count in enumerate(found)
        if count
    ]
    ticks_x, ticks_y = [Tick(across(x), f"{x:.3g}") for x in x_axis], [Tick(up(y), f"{y:g}") for y in y_axis]
    return Chart(title, note, [], ticks_x, ticks_y, bars, list(counts))


def ticks(values: Sequence[float], wanted: int = 4) -> list[float]:
    """Round numbers, the first not above the least value and the last not below the greatest."""
    low, high = min(values), max(values)
    if low == high:
        spread = abs(low) / 2 or 0.5
        low, high = low - spread, high + spread
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def averaged(points: Points, most: int) -> Points:
    """At most so many points, each the mean of as many neighbours as the others."""
    group = math.ceil(len(points) / most)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _scales(x_axis: Sequence[float], y_axis: Sequence[float]):
    """Places, in the picture, of a number on each axis."""
    x_low, x_span = x_axis[0], (x_axis[-1] - x_axis[0]) or 1
    y_low, y_span = y_axis[0], (y_axis[-1] - y_axis[0]) or 1

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / y_span * (HEIGHT - TOP - BOTTOM), 1)

    return across, up
