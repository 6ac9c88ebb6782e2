"""Line charts as inline SVG, and numbers in readable form.

Colours are CSS classes from ``templates/style.css``, so that charts follow the page into dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from vlm_distill.evaluation.seed_statistics import SeedComparison

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 30
_MOST_POINTS = 240
#: Half the span of an axis for values that are all zero, which are shares more often than not.
_FLAT_AT_ZERO = 0.1

Point = tuple[float, float]
#: x, and the lower and upper end of an interval there.
Span = tuple[float, float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: name of the run.
        css: its colour class.
        points: (x, y) by rising x; NaN and infinite points are left out.
        smooth: whether to draw the points faintly, with a moving average over them.
        level: whether to draw a horizontal dashed line at the y of the only point.
        band: intervals to shade around the line, by rising x.
    """

    label: str
    css: str
    points: Sequence[Point]
    smooth: bool = False
    level: bool = False
    band: Sequence[Span] = ()


@dataclass(frozen=True)
class _Scale:
    """Map data values to picture coordinates along one axis, by their logarithms if ``log``."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def numbers(self) -> str:
        return " ".join(f"{v:.8g}" for v in (self.low, self.high, self.start, self.stop))


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, percent: bool = False, log: bool = False
) -> Markup:
    """Draw a line chart; return an empty string if no line has a finite point.

    Args:
        title: what is drawn, for screen readers; the page adds its own caption.
        series: the lines.
        x_label: unit of the x axis, for screen readers.
        percent: whether y is a fraction to be shown in per cent.
        log: whether the x axis is logarithmic, with a tick at every point of the first line.
    """
    drawn = []
    for line in series:
        points = [point for point in line.points if math.isfinite(point[0]) and math.isfinite(point[1])]
        if points:
            drawn.append((line, points))
    if all(line.level for line, _ in drawn):
        return Markup("")
    x, y, x_ticks, y_ticks = _axes(drawn, log=log)

    def show(value: float) -> str:
        return f"{value * 100:.4g} %" if percent else compact(value)

    last = ", ".join(f"{line.label} {show(points[-1][1])}" for line, points in drawn)
    head = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-scale="{}" data-percent="{}"'
        ' data-log="{}">'
    )
    told = f"{title} by {x_label}; at the end: {last}"
    parts = [head.format(_WIDTH, _HEIGHT, told, f"{x.numbers()} {y.numbers()}", int(percent), int(log))]
    parts += _grid(x, y, x_ticks, [(tick, show(tick)) for tick in y_ticks])
    for line, points in drawn:
        parts += _line(x, y, line, points)
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _axes(
    drawn: Sequence[tuple[Series, Sequence[Point]]], *, log: bool
) -> tuple[_Scale, _Scale, list[float], list[float]]:
    """Return both scales and their ticks. Levels stretch the y axis only."""
    xs: list[float] = []
    ys: list[float] = []
    for line, points in drawn:
        ys += [y for _, y in points]
        for _, low, high in line.band:
            ys += [low, high]
        if not line.level:
            xs += [x for x, _ in points]
    # Begin at zero if the first point is near it.
    x_low = 0.0 if 0 < min(xs) < 0.1 * max(xs) and not log else min(xs)
    x_high = max(xs) if max(xs) > x_low else x_low + 1
    y_ticks = nice_ticks(min(ys), max(ys), 5)
    x = _Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT, log)
    y = _Scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), _HEIGHT - _BOTTOM, _TOP)
    return x, y, sorted(set(xs)) if log else nice_ticks(x_low, x_high, 5), y_ticks


def _grid(x: _Scale, y: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[tuple[float, str]]) -> list[Markup]:
    """Draw grid lines, the numbers beside the axes, and the guide that follows the pointer."""
    grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    left_number = Markup('<text x="{}" y="{}" dy=".32em" text-anchor="end">{}</text>')
    bottom_number = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    parts = []
    for tick, text in y_ticks:
        at = f"{y(tick):.1f}"
        parts.append(grid.format(_LEFT, _WIDTH - _RIGHT, at, at))
        parts.append(left_number.format(_LEFT - 7, at, text))
    for tick in x_ticks:
        if x.low <= tick <= x.high:
            parts.append(bottom_number.format(min(x(tick), _WIDTH - _RIGHT - 8), _HEIGHT - 11, compact(tick)))
    parts.append(Markup('<line class="guide" y1="{}" y2="{}" hidden=""/>').format(_TOP, _HEIGHT - _BOTTOM))
    return parts


def _line(x: _Scale, y: _Scale, line: Series, points: Sequence[Point]) -> list[Markup]:
    """Draw one series: a level, or the points with a moving average over them, with dots if they are few."""

    def polyline(points: Sequence[Point], css: str, label: str = "") -> Markup:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        name = Markup(' data-label="{}"').format(label) if label else ""
        return Markup('<polyline class="{}" points="{}"{}/>').format(css, path, name)

    if line.level:
        height = points[0][1]
        return [polyline([(x.low, height), (x.high, height)], f"line level {line.css}")]
    parts = []
    if line.band:
        edge = [(at, low) for at, low, _ in line.band] + [(at, high) for at, _, high in reversed(line.band)]
        corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in edge)
        parts.append(Markup('<polygon class="band {}" points="{}"/>').format(line.css, corners))
    points = thinned(points)
    if line.smooth and len(points) > 8:
        parts.append(polyline(points, f"line faint {line.css}"))
        points = smoothed(points)
    parts.append(polyline(points, f"line {line.css}", line.label))
    if len(points) <= 24:
        dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
        parts += [dot.format(line.css, x(a), y(b)) for a, b in points]
    return parts


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers that span ``low`` to ``high``."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) * 0.1 or _FLAT_AT_ZERO
        low, high = low - margin, high + margin
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most 240 points: means of equal groups of neighbours, and the last point."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    cuts = [round(i * len(points) / _MOST_POINTS) for i in range(_MOST_POINTS + 1)]
    means = []
    for start, stop in pairwise(cuts):
        xs, ys = zip(*points[start:stop], strict=True)
        means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return [*means[:-1], points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return a centred moving average over a twelfth of the points, with a shorter window at both ends."""
    half = max(1, len(points) // 24)
    result = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        result.append((x, sum(y for _, y in near) / len(near)))
    return result


def compact(value: float) -> str:
    """Format a number in about five characters at most: 1.5 M, 340, 0.043, 5e-06."""
    size = abs(value)
    for power, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= power:
            unit = 1e3 if sign == "k" else power
            return f"{value / unit:.3g} {sign}".replace("-", "−")
    text = f"{value:.4g}" if size >= 1e-3 or size == 0 else f"{value:.2g}"
    return text.replace("-", "−") if "e" not in text else text


def percent(value: float | None) -> str:
    """Format a fraction in per cent with one decimal; ``–`` for ``None``."""
    return "–" if value is None else f"{value * 100:.1f} %"


def points(value: float) -> str:
    """Format a difference of fractions in signed percentage points."""
    return f"{value * 100:+z.1f}".replace("-", "−")


def spread(mean: float, beside: float | None, sign: str = "") -> str:
    """Format a mean and what is beside it, such as ``83.6 ± 2.0``, with as many decimals as the spread is known to."""
    digits = decimals(beside if beside else mean)
    text = f"{mean:{sign}z.{digits}f}".replace("-", "−")
    return text if beside is None else f"{text} ± {beside:.{digits}f}"


def decimals(size: float) -> int:
    """Return decimals that show two significant digits of ``size``, at least one and at most four."""
    if not size:
        return 1
    return min(4, max(1, 1 - math.floor(math.log10(abs(size)))))


def in_figures(value: float) -> str:
    """Format a score of a table: one decimal, or three below one."""
    text = f"{value:.{1 if abs(value) >= 1 else 3}f}"
    return text.replace("-", "−")


def needed(found: SeedComparison, verdict: str) -> str:
    """Format how many seeds would show a difference that these did not show."""
    if verdict != "no difference shown":
        return ""
    return "over 1,000" if found.needed is None else f"{found.needed:,}"


def duration(seconds: float) -> str:
    """Format seconds as ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size_in_bytes(value: float) -> str:
    """Format bytes in binary units."""
    power = min(4, max(0, int(value).bit_length() - 1) // 10)
    return f"{value / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def swatch(css: str, label: str) -> Markup:
    """Return a legend entry."""
    return Markup('<span class="swatch {}">{}</span>').format(css, escape(label))
