"""Charts and numbers as people read them."""

import math
import re

import pytest

from vlm_distill.reporting import plots


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.4, 1), (-3, 17), (1e-5, 3e-3), (5, 5), (0, 0), (123456, 123457), (-2, -2)]
)
def test_ticks_are_few_round_and_cover_the_range(low, high):
    ticks = plots.nice_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert ticks == sorted(set(ticks))


def polylines(svg):
    return [
        [tuple(map(float, p.split(","))) for p in found.split()] for found in re.findall(r'points="([^"]*)"', str(svg))
    ]


def test_the_line_runs_from_corner_to_corner():
    svg = plots.line_chart("t", [plots.Series("a", "c0", [(0, 0.0), (10, 1.0)])], x_label="steps")
    (line,) = polylines(svg)
    (x0, y0), (x1, y1) = line
    assert x0 < x1
    assert y0 > y1  # SVG counts downwards
    assert "a 1" in svg  # the last value, for screen readers


def test_points_that_are_not_finite_are_left_out():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    (line,) = polylines(plots.line_chart("t", [plots.Series("a", "c0", points)], x_label="steps"))
    assert len(line) == 2
    assert plots.line_chart("t", [plots.Series("a", "c0", [(0, math.nan)])], x_label="steps") == ""


def test_long_series_are_thinned_and_keep_their_end_and_mean():
    points = [(float(i), float(i % 2)) for i in range(10_001)]
    thin = plots.thinned(points)
    assert len(thin) == 240
    assert thin[-1] == points[-1]
    assert sum(y for _, y in thin) / len(thin) == pytest.approx(0.5, abs=0.02)


def test_smoothing_keeps_a_straight_line_and_flattens_noise():
    inner = slice(10, -10)
    line = [(float(i), 2.0 * i) for i in range(100)]
    assert plots.smoothed(line)[inner] == line[inner]
    noise = plots.smoothed([(float(i), float((-1) ** i)) for i in range(100)])
    assert max(abs(y) for _, y in noise[inner]) < 0.2


def test_labels_are_escaped():
    svg = plots.line_chart("<t>", [plots.Series('"><script>', "c0", [(0, 1.0), (1, 2.0)])], x_label="steps")
    assert "<script" not in svg
    assert "<t>" not in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.002, "0.002"), (5e-6, "5e-06"), (1234, "1234"), (75312, "75.3 k"), (1.512e6, "1.51 M"), (-2, "−2")],
)
def test_compact(value, text):
    assert plots.compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (59.7, "1 min 00 s")],
)
def test_duration(seconds, text):
    assert plots.duration(seconds) == text


def test_sizes_and_points():
    assert plots.size_in_bytes(512) == "512 B"
    assert plots.size_in_bytes(812 * 2**20) == "812.0 MiB"
    assert plots.size_in_bytes(5 * 2**40) == "5.0 TiB"
    assert plots.points(0.0126) == "+1.3"
    assert plots.points(-0.0126) == "−1.3"
    assert plots.percent(None) == "–"
