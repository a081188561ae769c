"""Numbers to places in a picture, by hand."""

from __future__ import annotations

import pytest

from rlhf.report.html.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, averaged, calibration, curves, histogram, ticks


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], [0, 0.5, 1]),
        ([0, 4], [0, 1, 2, 3, 4]),
        ([-3, 1.2], [-4, -2, 0, 2]),
        ([2, 2], [1, 1.5, 2, 2.5, 3]),
        ([0, 0], [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round_and_span_the_values(values, expected):
    assert ticks(values) == pytest.approx(expected)


def test_a_curve_goes_from_corner_to_corner():
    chart = curves("t", "", {"a": [(0, 0.0), (10, 4.0)]})
    assert chart is not None
    assert chart.lines[0].dots == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]


def test_nothing_to_draw():
    assert curves("t", "", {"a": [(0, 1.0)]}) is None
    assert curves("t", "", {"a": [(0, float("nan")), (1, float("inf"))]}) is None
    assert histogram("t", "", {"a": []}) is None
    assert calibration([]) is None


def test_means_of_neighbours():
    assert averaged([(1, 1), (2, 3), (3, 10)], 2) == [(1.5, 2), (3, 10)]
    assert len(averaged([(x, 0) for x in range(1000)], 240)) <= 240


def test_a_histogram_counts():
    chart = histogram("t", "", {"a": [0, 0, 1], "b": [1]}, bins=2)
    assert chart is not None
    whole = HEIGHT - BOTTOM - TOP
    assert [(bar[3], bar[4]) for bar in chart.bars] == [(whole, 0), (whole / 2, 0), (whole / 2, 1)]
