"""Line charts as inline SVG, and numbers as people read them.

Colours are classes, defined in ``templates/style.css``, so that charts follow the page into dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 30
_MOST_POINTS = 240

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: the run.
        css: its colour class.
        points: (x, y) in rising x; points that are not finite are left out.
        smooth: draw the points faintly and a moving average over them.
        level: a horizontal, dashed reference at the single point's y.
    """

    label: str
    css: str
    points: Sequence[Point]
    smooth: bool = False
    level: bool = False


@dataclass(frozen=True)
class _Scale:
    """Data to picture, along one axis."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def line_chart(title: str, series: Sequence[Series], *, x_label: str, percent: bool = False) -> Markup:
    """A line chart, or nothing where no series has a finite point.

    Args:
        title: what is drawn, for screen readers; the caption is the page's.
        x_label: written under the axis.
        percent: y is a fraction and shown in per cent.
    """
    drawn = [(s, [p for p in s.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for s in series]
    drawn = [(s, points) for s, points in drawn if points]
    lines = [(s, points) for s, points in drawn if not s.level]
    if not lines:
        return Markup("")
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    x_low = 0.0 if 0 < min(xs) < 0.1 * max(xs) else min(xs)
    x_high = max(xs) if max(xs) > x_low else x_low + 1
    x_ticks = nice_ticks(x_low, x_high, 5)
    y_ticks = nice_ticks(min(ys), max(ys), 5)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    x = _Scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    y = _Scale(y_low, y_high, _HEIGHT - _BOTTOM, _TOP)

    def show(value: float) -> str:
        return f"{value * 100:.4g} %" if percent else compact(value)

    last = ", ".join(f"{s.label} {show(points[-1][1])}" for s, points in drawn)
    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-scale="{}" data-percent="{}">'
        ).format(
            _WIDTH,
            _HEIGHT,
            f"{title} by {x_label}; at the end: {last}",
            " ".join(f"{v:.8g}" for v in (x.low, x.high, x.start, x.stop, y.low, y.high, y.start, y.stop)),
            int(percent),
        )
    ]
    grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    number = Markup('<text x="{}" y="{}" dy=".32em" text-anchor="end">{}</text>')
    for tick in y_ticks:
        at = f"{y(tick):.1f}"
        parts.append(grid.format(_LEFT, _WIDTH - _RIGHT, at, at))
        parts.append(number.format(_LEFT - 7, at, show(tick)))
    for tick in x_ticks:
        if x.low <= tick <= x.high:
            where = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
            parts.append(where.format(min(x(tick), _WIDTH - _RIGHT - 8), _HEIGHT - 11, compact(tick)))
    parts.append(Markup('<line class="guide" y1="{}" y2="{}" hidden=""/>').format(_TOP, _HEIGHT - _BOTTOM))

    def polyline(points: Sequence[Point], css: str, label: str = "") -> Markup:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        name = Markup(' data-label="{}"').format(label) if label else ""
        return Markup('<polyline class="{}" points="{}"{}/>').format(css, path, name)

    for s, points in drawn:
        if s.level:
            ends = [(x.low, points[0][1]), (x.high, points[0][1])]
            parts.append(polyline(ends, f"line level {s.css}"))
            continue
        points = thinned(points)
        if s.smooth and len(points) > 8:
            parts.append(polyline(points, f"line faint {s.css}"))
            points = smoothed(points)
        parts.append(polyline(points, f"line {s.css}", s.label))
        if len(points) <= 24:
            dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
            parts += [dot.format(s.css, x(a), y(b)) for a, b in points]
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from at most ``low`` to at least ``high``."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, last + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most 240 points: means of equal groups of neighbours, the last point kept."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    cuts = [round(i * len(points) / _MOST_POINTS) for i in range(_MOST_POINTS + 1)]
    groups = [points[a:b] for a, b in pairwise(cuts)]
    means = [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]
    return [*means[:-1], points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A centred moving average over a twelfth of the points, cut short at both ends."""
    half = max(1, len(points) // 24)
    result = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        result.append((x, sum(y for _, y in near) / len(near)))
    return result


def compact(value: float) -> str:
    """A number in at most about five characters: 1.5 M, 340, 0.043, 5e-06."""
    size = abs(value)
    for power, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= power:
            return f"{value / (1e3 if sign == 'k' else power):.3g} {sign}".replace("-", "−")
    text = f"{value:.4g}" if size >= 1e-3 or size == 0 else f"{value:.2g}"
    return text.replace("-", "−") if "e" not in text else text


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal; ``–`` for none."""
    return "–" if value is None else f"{value * 100:.1f} %"


def points(value: float) -> str:
    """A difference of fractions in signed percentage points."""
    return f"{value * 100:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size_in_bytes(value: float) -> str:
    """Bytes in binary units."""
    power = min(4, max(0, int(value).bit_length() - 1) // 10)
    return f"{value / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def swatch(css: str, label: str) -> Markup:
    """A legend entry."""
    return Markup('<span class="swatch {}">{}</span>').format(css, escape(label))
