"""One self-contained page about a sweep, its CSV and its LaTeX."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data.errors import UserError
from vlm_distill.evaluation.crossed import Crossed, compare_crossed
from vlm_distill.evaluation.measures import MEASURES
from vlm_distill.evaluation.predictions import Prediction, read_predictions
from vlm_distill.evaluation.seed_statistics import SeedComparison, compare_seeds, verdicts
from vlm_distill.reporting import plots
from vlm_distill.reporting.rendering import environment
from vlm_distill.version import __version__

from .figures import choices_of, curve_figures, facets, lines_axis, score_figures, shown_lines
from .latex import latex_tables
from .record import SweepRecord
from .results import Result, main_scores, read_results, write_csv
from .table import Row, Setting, baseline_of, rows_of

PAGE, TABLE, LATEX = "sweep.html", "sweep.csv", "sweep.tex"
#: A matrix of all pairs is shown for at most this many choices.
_MOST_PAIRED = 12


@dataclass(frozen=True)
class ShownRow:
    """A row of a page's table, as text."""

    row: Row
    css: str
    score: str
    difference: str
    needed: str
    crossed: Crossed | None
    seconds: str
    memory: str
    parameters: str


def write_sweep(sweep: SweepRecord, out: Path | None = None) -> Path:
    """Write a sweep's CSV, LaTeX and page; return the page.

    Args:
        sweep: whose finished runs are shown.
        out: the page; by default ``sweep.html`` in the sweep's folder. The other files are beside it.

    Raises:
        UserError: no run is finished, or a file of a run is damaged.
    """
    results = read_results(sweep)
    if not results:
        raise UserError(f"{sweep.output}: no run of this sweep is finished; start `vlm-distill sweep` again")
    page = out or sweep.output / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    write_csv(page.with_name(TABLE), sweep, results)
    latex = latex_tables(sweep, results)
    page.with_name(LATEX).write_text(latex, encoding="utf-8")
    sections = [_section(sweep, results, data, measure) for data, measure in main_scores(r.scores for r in results)]
    distinct = {run.folder: run.done for run in sweep.runs}
    text = (
        environment()
        .get_template("sweep.html.j2")
        .render(
            title=sweep.title.replace("_", " "),
            sweep=sweep,
            axes=list(sweep.axes) or ["setting"],
            choices={axis: choices_of(sweep.runs, axis) for axis in sweep.axes},
            seeds=sorted({run.seed for run in sweep.runs}),
            done=sum(distinct.values()),
            runs=len(distinct),
            sections=sections,
            latex=latex,
            version=__version__,
        )
    )
    page.write_text(text, "utf-8", errors="backslashreplace")
    return page


def _section(sweep: SweepRecord, results: Sequence[Result], data: str, measure: str) -> dict[str, Any]:
    rows = rows_of(sweep, results, data, measure)
    crossed = _crossed(sweep, results, rows, data) if measure == "exact" else {}
    shown = shown_lines(sweep, results, (data, measure))
    return {
        "data": data,
        "measure": MEASURES[measure],
        "rows": [_shown(sweep, results, row, shown, crossed.get(row.setting)) for row in rows],
        "counts": {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("better", "worse")},
        "compared": sum(row.against is not None for row in rows),
        "crossed": bool(crossed),
        "sizes": len({r.parameters.get("student") for r in results}) > 1,
        "reach": _reach(rows),
        "figures": score_figures(sweep, results, (data, measure), shown),
        "curves": curve_figures(sweep, results, (data, measure), shown),
        "legend": [plots.swatch(css, name) for name, css in shown.items()],
        "matrices": _matrices(sweep, rows, lower=MEASURES[measure].lower),
    }


def _shown(
    sweep: SweepRecord, results: Sequence[Result], row: Row, colours: Mapping[str, str], crossed: Crossed | None
) -> ShownRow:
    own = [r for r in results if tuple(r.run.setting[axis] for axis in sweep.axes) == row.setting]
    seconds = [r.seconds for r in own if r.seconds is not None]
    memory = [r.peak_bytes for r in own if r.peak_bytes is not None]
    lines = lines_axis(sweep)
    css = colours.get(own[0].run.setting[lines], "") if lines is not None else ""
    against = row.against
    return ShownRow(
        row,
        css,
        plots.spread(row.mean, row.deviation),
        "" if against is None else plots.spread(against.difference, against.half, sign="+"),
        "" if against is None else plots.needed(against, row.verdict),
        crossed,
        plots.duration(median(seconds)) if seconds else "",
        plots.size_in_bytes(max(memory)) if memory else "",
        plots.compact(own[0].parameters["student"]) if own[0].parameters.get("student") else "",
    )


def _reach(rows: Sequence[Row]) -> float:
    """Return half the length of an axis on which the differences and their intervals fit."""
    ends = [0.0]
    for row in rows:
        if row.against is not None:
            ends.append(abs(row.against.difference) + (row.against.half or 0.0))
    return 1.05 * max(ends) or 1.0


def _crossed(sweep: SweepRecord, results: Sequence[Result], rows: Sequence[Row], data: str) -> dict[Setting, Crossed]:
    """Return each setting's difference from its baseline across seeds and questions, where answers are kept."""
    kept: dict[Setting, dict[int, list[Prediction]]] = {}

    def answers(setting: Setting) -> dict[int, list[Prediction]]:
        found = {}
        for result in results:
            path = result.run.folder / "evaluation" / data / "student" / "predictions.jsonl"
            if tuple(result.run.setting[axis] for axis in sweep.axes) == setting and path.is_file():
                found[result.run.seed] = read_predictions(path)
        return found

    differences = {}
    for row in rows:
        baseline = baseline_of(sweep, row.setting)
        if row.against is None or baseline is None:
            continue
        if baseline not in kept:
            kept = {baseline: answers(baseline)}  # only one at a time: answers are large
        own = answers(row.setting)
        if not own or not kept[baseline]:
            continue
        found = compare_crossed(own, kept[baseline])
        if found is not None:
            differences[row.setting] = found
    return differences


@dataclass(frozen=True)
class Matrix:
    """All choices of the compared axis against each other, at equal choices of the other axes."""

    title: str
    names: Sequence[str]
    cells: Mapping[tuple[str, str], tuple[str, str]]


def _matrices(sweep: SweepRecord, rows: Sequence[Row], *, lower: bool) -> list[Matrix]:
    """Compare all pairs, with Holm's correction over all matrices; a cell is row minus column, and a verdict."""
    lines = lines_axis(sweep)
    if lines is None:
        return []
    place = list(sweep.axes).index(lines)
    couples: list[tuple[str, Row, Row]] = []
    names: dict[str, list[str]] = {}
    for facet in facets(sweep, [lines]):
        title = " · ".join(facet.values())
        own = [row for row in rows if _other_axes(row, place) == tuple(facet.values())]
        names[title] = [row.setting[place] for row in own]
        if 2 < len(own) <= _MOST_PAIRED:
            couples += [(title, first, second) for first, second in itertools.combinations(own, 2)]
    found = [compare_seeds(first.values, second.values) for _, first, second in couples]
    cells: dict[str, dict[tuple[str, str], tuple[str, str]]] = {}
    for (title, first, second), one, said in zip(couples, found, verdicts(found, lower=lower), strict=True):
        a, b = first.setting[place], second.setting[place]
        own_cells = cells.setdefault(title, {})
        own_cells[a, b] = (_signed(one, 1), said)
        own_cells[b, a] = (_signed(one, -1), {"better": "worse", "worse": "better"}.get(said, said))
    return [Matrix(title, names[title], found) for title, found in cells.items()]


def _other_axes(row: Row, place: int) -> tuple[str, ...]:
    return (*row.setting[:place], *row.setting[place + 1 :])


def _signed(found: SeedComparison, sign: int) -> str:
    digits = plots.decimals(found.half or found.difference)
    return f"{sign * found.difference:+.{digits}f}".replace("-", "−")
