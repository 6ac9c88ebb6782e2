"""A sweep's tables for LaTeX, with the package booktabs."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_distill.evaluation.measures import MEASURES
from vlm_distill.reporting.plots import spread

from .record import SweepRecord
from .results import Result, main_scores
from .table import Row, rows_of

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def latex_tables(sweep: SweepRecord, results: Sequence[Result]) -> str:
    """Return a table for each data set and measure: means, deviations over seeds, and differences from the baseline.

    Shown differences are in bold.
    """
    return (
        "\n\n".join(_table(sweep, results, *score) for score in main_scores(result.scores for result in results)) + "\n"
    )


def _table(sweep: SweepRecord, results: Sequence[Result], data: str, measure: str) -> str:
    rows = rows_of(sweep, results, data, measure)
    axes = list(sweep.axes) or ["setting"]
    heads = [*map(escape, axes), "seeds", escape(f"{data}: {MEASURES[measure].heading}")]
    if sweep.baseline is not None:
        heads.append(f"$-$ {escape(sweep.baseline[1])}, 95\\,\\%")
    numbers = "r" * (len(heads) - len(axes))
    lines = [f"\\begin{{tabular}}{{{'l' * len(axes)}{numbers}}}", "\\toprule", f"{' & '.join(heads)} \\\\", "\\midrule"]
    lines += [f"{' & '.join(_cells(sweep, row))} \\\\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def _cells(sweep: SweepRecord, row: Row) -> list[str]:
    cells = [escape(name) for name in row.setting] or [escape(sweep.title)]
    cells += [str(len(row.values)), _math(spread(row.mean, row.deviation))]
    if sweep.baseline is None:
        return cells
    if row.against is None:
        return [*cells, ""]
    difference = _math(spread(row.against.difference, row.against.half, sign="+"))
    return [*cells, f"\\textbf{{{difference}}}" if row.verdict in ("better", "worse") else difference]


def _math(text: str) -> str:
    plain = text.replace("−", "-").replace("±", r"\pm")
    return f"${plain}$"


def escape(text: str) -> str:
    """Return a text as LaTeX shows it literally."""
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
