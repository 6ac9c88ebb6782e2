"""Pictures of a classifier's answers as inline SVG: how sure it is when it is right, and what it takes for what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

_SIDE = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 40


def reliability(models: Sequence[tuple[str, str, Sequence[Mapping[str, float]]]]) -> Markup:
    """A reliability diagram: share of right answers by confidence, a dot's area the share of images there.

    Args:
        models: label, colour class and bins (``n``, ``confidence``, ``exact``) of each; nothing is drawn without bins.
    """
    models = [model for model in models if model[2]]
    if not models:
        return Markup("")
    start, stop, top, bottom = _LEFT, _SIDE - _RIGHT, _TOP, _SIDE - _BOTTOM

    def x(value: float) -> float:
        return start + value * (stop - start)

    def y(value: float) -> float:
        return bottom + value * (top - bottom)

    parts = [
        Markup(
            '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-scale="0 1 {} {} 0 1 {} {}"'
            ' data-percent="1">'
        ).format(_SIDE, _SIDE, f"Accuracy by confidence of {', '.join(m[0] for m in models)}", start, stop, bottom, top)
    ]
    for k in range(0, 101, 25):
        at = k / 100
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(start, stop, y(at), y(at))
        )
        parts.append(
            Markup('<text x="{}" y="{:.1f}" dy=".32em" text-anchor="end">{} %</text>').format(start - 7, y(at), k)
        )
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{} %</text>').format(
                x(at), bottom + 17, "end" if k == 100 else "middle", k
            )
        )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">confidence</text>').format((start + stop) / 2, _SIDE - 6)
    )
    parts.append(Markup('<line class="guide" y1="{}" y2="{}" hidden=""/>').format(top, bottom))
    parts.append(Markup('<line class="ideal" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x(0), y(0), x(1), y(1)))
    for label, css, bins in models:
        total = sum(b["n"] for b in bins)
        path = " ".join(f"{x(b['confidence']):.1f},{y(b['exact']):.1f}" for b in bins)
        parts.append(Markup('<polyline class="line {}" points="{}" data-label="{}"/>').format(css, path, label))
        for b in bins:
            radius = 1.5 + 6 * math.sqrt(b["n"] / total)
            parts.append(
                Markup('<circle class="dot some {}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(
                    css, x(b["confidence"]), y(b["exact"]), radius
                )
            )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def confusion(title: str, css: str, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Markup:
    """What is taken for what: a row for each right class, shaded by the share of its images with each answer.

    Args:
        title: for screen readers.
        names: the classes, at most some twenty.
        pairs: (right class, answer) of every image; answers that are no class of the data share a last column.
    """
    columns = [*names, "other"] if any(answer not in names for _, answer in pairs) else list(names)
    counts = {right: dict.fromkeys(columns, 0) for right in names}
    for right, answer in pairs:
        if right in counts:
            counts[right][answer if answer in columns else "other"] += 1
    cell = 27
    left = 12 + min(120, 6.6 * max(len(_short(name)) for name in names))
    width, head = left + cell * len(columns) + 4, 12 + min(104, 5.6 * max(len(_short(name)) for name in columns))
    height = head + cell * len(names) + 4
    parts = [
        Markup(
            '<svg class="confusion {}" viewBox="0 0 {:.0f} {:.0f}" style="max-width:{:.0f}px" role="img" aria-label="{}">'
        ).format(css, width, height, 1.25 * width, f"{title}: {_commonest(counts)}")
    ]
    for k, name in enumerate(columns):
        at = left + cell * (k + 0.5)
        parts.append(
            Markup('<text transform="translate({:.1f} {:.1f}) rotate(-60)" dy=".3em">{}</text>').format(
                at, head - 6, _short(name)
            )
        )
    for j, right in enumerate(names):
        total = sum(counts[right].values())
        middle = head + cell * (j + 0.5)
        parts.append(
            Markup('<text x="{:.1f}" y="{:.1f}" dy=".32em" text-anchor="end">{}</text>').format(
                left - 7, middle, _short(right)
            )
        )
        for k, answer in enumerate(columns):
            n = counts[right][answer]
            share = n / total if total else 0.0
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{}" height="{}" fill-opacity="{:.2f}">'
                    "<title>{}</title></rect>"
                ).format(
                    "hit" if right == answer else "miss",
                    left + cell * k + 1,
                    head + cell * j + 1,
                    cell - 2,
                    cell - 2,
                    # Few are faint and not invisible.
                    0 if n == 0 else 0.08 + 0.92 * share,
                    f"{right} answered as {answer}: {n:,} of {total:,}",
                )
            )
            if n:
                parts.append(
                    Markup('<text class="{}" x="{:.1f}" y="{:.1f}" dy=".34em" text-anchor="middle">{}</text>').format(
                        "on" if share > 0.5 else "count",
                        left + cell * (k + 0.5),
                        middle,
                        n if n < 10_000 else f"{n // 1000}k",
                    )
                )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def _commonest(counts: Mapping[str, Mapping[str, int]]) -> str:
    wrong = [(n, right, answer) for right, row in counts.items() for answer, n in row.items() if n and answer != right]
    if not wrong:
        return "no mistakes"
    n, right, answer = max(wrong, key=lambda item: item[0])
    return f"the commonest mistake is {right} answered as {answer}, {n:,} times"
