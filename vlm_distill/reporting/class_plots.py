"""Reliability diagrams and confusion matrices of classifiers, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

_SIDE = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 40
_CELL = 27
_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" dy=".32em" text-anchor="{}">{}</text>')


def reliability(models: Sequence[tuple[str, str, Sequence[Mapping[str, float]]]]) -> Markup:
    """Draw a reliability diagram: accuracy by confidence. A dot's area is the share of images in its bin.

    Args:
        models: label, colour class and bins (``n``, ``confidence``, ``exact``) of each. Models without bins are left
            out; if none is left, an empty string is returned.
    """
    models = [model for model in models if model[2]]
    if not models:
        return Markup("")
    start, stop, top, bottom = _LEFT, _SIDE - _RIGHT, _TOP, _SIDE - _BOTTOM

    def x(value: float) -> float:
        return start + value * (stop - start)

    def y(value: float) -> float:
        return bottom + value * (top - bottom)

    told = f"Accuracy by confidence of {', '.join(label for label, _, _ in models)}"
    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-scale="0 1 {} {} 0 1 {} {}"'
            ' data-percent="1">'
        ).format(_SIDE, _SIDE, told, start, stop, bottom, top)
    ]
    grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    for k in range(0, 101, 25):
        at = k / 100
        parts.append(grid.format(start, stop, y(at), y(at)))
        parts.append(_TEXT.format(start - 7, y(at), "end", f"{k} %"))
        parts.append(_TEXT.format(x(at), bottom + 14, "end" if k == 100 else "middle", f"{k} %"))
    parts.append(_TEXT.format((start + stop) / 2, _SIDE - 9, "middle", "confidence"))
    parts.append(Markup('<line class="guide" y1="{}" y2="{}" hidden=""/>').format(top, bottom))
    parts.append(Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x(0), y(0), x(1), y(1)))
    for label, css, bins in models:
        total = sum(b["n"] for b in bins)
        path = " ".join(f"{x(b['confidence']):.1f},{y(b['exact']):.1f}" for b in bins)
        parts.append(Markup('<polyline class="line {}" points="{}" data-label="{}"/>').format(css, path, label))
        dot = Markup('<circle class="dot some {}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>')
        for b in bins:
            parts.append(dot.format(css, x(b["confidence"]), y(b["exact"]), 1.5 + 6 * math.sqrt(b["n"] / total)))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def confusion(title: str, css: str, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Markup:
    """Draw a confusion matrix: one row per right class, shaded by the share of its images with each answer.

    Args:
        title: text for screen readers.
        css: colour class.
        names: the classes, at most about twenty.
        pairs: (right class, answer) of every image. Answers outside the classes share a last column, "other".
    """
    columns = [*names, "other"] if any(answer not in names for _, answer in pairs) else list(names)
    counts = {right: dict.fromkeys(columns, 0) for right in names}
    for right, answer in pairs:
        if right in counts:
            counts[right][answer if answer in columns else "other"] += 1
    left = 12 + 6.6 * max(len(_short(name)) for name in names)
    head = 12 + 5.6 * max(len(_short(name)) for name in columns)
    # Slanted names lean over the cells to their right, the last ones beyond the matrix.
    ends = [left + _CELL * (k + 0.5) + 3.6 * len(_short(name)) for k, name in enumerate(columns)]
    width, height = max(left + _CELL * len(columns), *ends) + 4, head + _CELL * len(names) + 4
    parts = [
        Markup(
            '<svg class="confusion {}" viewBox="0 0 {:.0f} {:.0f}" style="max-width:{:.0f}px" role="img"'
            ' aria-label="{}">'
        ).format(css, width, height, 1.25 * width, f"{title}: {_commonest(counts)}")
    ]
    slanted = Markup('<text transform="translate({:.1f} {:.1f}) rotate(-60)" dy=".3em">{}</text>')
    for k, name in enumerate(columns):
        parts.append(slanted.format(left + _CELL * (k + 0.5), head - 6, _short(name)))
    square = Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{}" height="{}" fill-opacity="{:.2f}"><title>{}</title></rect>'
    )
    number = Markup('<text class="{}" x="{:.1f}" y="{:.1f}" dy=".34em" text-anchor="middle">{}</text>')
    for j, (right, row) in enumerate(counts.items()):
        total = sum(row.values())
        y = head + _CELL * j
        parts.append(_TEXT.format(left - 7, y + _CELL / 2, "end", _short(right)))
        for k, (answer, n) in enumerate(row.items()):
            x = left + _CELL * k
            share = n / total if total else 0.0
            opacity = 0.08 + 0.92 * share if n else 0.0  # even a single image is visible
            kind, told = "hit" if right == answer else "miss", f"{right} answered as {answer}: {n:,} of {total:,}"
            parts.append(square.format(kind, x + 1, y + 1, _CELL - 2, _CELL - 2, opacity, told))
            if n:
                shown = n if n < 10_000 else f"{n // 1000}k"
                parts.append(number.format("on" if share > 0.5 else "count", x + _CELL / 2, y + _CELL / 2, shown))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _commonest(counts: Mapping[str, Mapping[str, int]]) -> str:
    wrong = []
    for right, row in counts.items():
        wrong += [(n, right, answer) for answer, n in row.items() if n and answer != right]
    if not wrong:
        return "no mistakes"
    n, right, answer = max(wrong, key=lambda item: item[0])
    return f"the most frequent mistake is {right} answered as {answer}, {n:,} times"
