"""A sweep's figures: score against axes that are numbers, and curves of training, with bands over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from markupsafe import Markup

from vlm_distill.evaluation.measures import MEASURES
from vlm_distill.evaluation.seed_statistics import compare_seeds, deviation_of, t_interval
from vlm_distill.reporting import plots
from vlm_distill.reporting.entries import is_number
from vlm_distill.reporting.run_folder import read_metrics

from .record import RecordedRun, SweepRecord
from .results import Result, Score

#: Colours of a page; a figure shows no more lines.
COLOURS = 8
#: Fewer seeds have a t-interval so wide that their range says more.
_INTERVAL_FROM = 3
#: Numbers that span more than this factor are drawn on a logarithmic axis.
_LOG_FROM = 8.0

Figure = tuple[str, Markup]
_ByNumber = dict[float, dict[int, float]]


def lines_axis(sweep: SweepRecord) -> str | None:
    """Return the axis whose choices are a figure's lines: the baseline's, or the first."""
    if sweep.baseline is not None:
        return sweep.baseline[0]
    return sweep.axes[0] if sweep.axes else None


def choices_of(runs: Sequence[RecordedRun], axis: str | None) -> list[str]:
    """Return an axis's choices in the sweep's order; one empty name for no axis."""
    return list(dict.fromkeys(run.setting[axis] if axis is not None else "" for run in runs))


def facets(sweep: SweepRecord, without: Sequence[str | None]) -> Iterator[dict[str, str]]:
    """Yield every combination of the choices of all axes but some."""
    axes = [axis for axis in sweep.axes if axis not in without]
    for names in product(*(choices_of(sweep.runs, axis) for axis in axes)):
        yield dict(zip(axes, names, strict=True))


def shown_lines(sweep: SweepRecord, results: Sequence[Result], score: Score) -> dict[str, str]:
    """Return the names and colours of a page's lines: all choices, or of too many the baseline and the best."""
    lines = lines_axis(sweep)
    values: dict[str, list[float]] = {}
    for result in results:
        if lines is not None and score in result.scores:
            values.setdefault(result.run.setting[lines], []).append(result.scores[score])
    sign = 1 if MEASURES[score[1]].lower else -1
    ranked = sorted(values, key=lambda name: sign * sum(values[name]) / len(values[name]))
    if sweep.baseline is not None and sweep.baseline[1] in ranked:
        ranked.remove(sweep.baseline[1])
        ranked.insert(0, sweep.baseline[1])
    kept = [name for name in choices_of(sweep.runs, lines) if name in ranked[:COLOURS]]
    return {name: f"c{k}" for k, name in enumerate(kept)}


def score_figures(
    sweep: SweepRecord, results: Sequence[Result], score: Score, shown: Mapping[str, str]
) -> list[Figure]:
    """Return figures of a score against each axis that is a number, and of its difference from the baseline.

    Scores are means, with an interval or range over seeds; differences are paired by seed, with their interval.
    """
    heading = MEASURES[score[1]].heading
    figures = []
    for axis in sweep.axes:
        numbers = {run.setting[axis]: run.numbers.get(axis) for run in sweep.runs}
        known = [value for value in numbers.values() if value is not None]
        if len(known) < max(2, len(numbers)):
            continue
        log = min(known) > 0 and max(known) >= _LOG_FROM * min(known)
        lines = lines_axis(sweep) if lines_axis(sweep) != axis else None
        for facet in facets(sweep, [axis, lines]):
            inside = [r for r in results if score in r.scores and _within(r.run, facet)]
            found: dict[str, _ByNumber] = {}
            for name in shown if lines is not None else ["mean"]:
                own = [r for r in inside if lines is None or r.run.setting[lines] == name]
                found[name] = _by_number(own, score, axis)
            drawn = {f"{heading} by {axis}": [_line(name, shown.get(name, "c0"), own) for name, own in found.items()]}
            if lines is not None and sweep.baseline is not None:
                baseline = sweep.baseline[1]
                drawn[f"{heading}: difference from {baseline} by {axis}"] = [
                    _difference(name, shown[name], own, found.get(baseline, {}))
                    for name, own in found.items()
                    if name != baseline
                ]
            for title, series in drawn.items():
                caption = " · ".join([title, *facet.values()])
                figures.append((caption, plots.line_chart(caption, series, x_label=axis, log=log)))
    return [(caption, chart) for caption, chart in figures if chart]


def _by_number(results: Sequence[Result], score: Score, axis: str) -> _ByNumber:
    """Return scores by seed, as tables show them, for each number of an axis."""
    found: _ByNumber = {}
    for result in results:
        value = MEASURES[score[1]].scale * result.scores[score]
        found.setdefault(result.run.numbers[axis], {})[result.run.seed] = value
    return dict(sorted(found.items()))


def _line(name: str, css: str, found: _ByNumber) -> plots.Series:
    ends = {number: _interval(list(values.values())) for number, values in found.items()}
    band = [(number, low, high) for number, (low, _, high) in ends.items()]
    return plots.Series(name, css, [(number, mean) for number, (_, mean, _) in ends.items()], band=band)


def _difference(name: str, css: str, found: _ByNumber, baseline: _ByNumber) -> plots.Series:
    points, band = [], []
    for number in found.keys() & baseline.keys():
        one = compare_seeds(found[number], baseline[number])
        points.append((number, one.difference))
        if one.half is not None:
            band.append((number, one.difference - one.half, one.difference + one.half))
    return plots.Series(name, css, sorted(points), band=sorted(band))


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower end, mean and upper end: of the 95 % t-interval, or of the range of two seeds."""
    mean, half = t_interval(values)
    if half is None or len(values) < _INTERVAL_FROM:
        return min(values), mean, max(values)
    return mean - half, mean, mean + half


def curve_figures(
    sweep: SweepRecord, results: Sequence[Result], score: Score, shown: Mapping[str, str]
) -> list[Figure]:
    """Return curves by step with bands of one standard deviation over seeds: a score in training, and TAID's t.

    One figure for each combination of the other axes. What only the end of a run measures has no curve.
    """
    lines, measure = lines_axis(sweep), MEASURES[score[1]]
    kinds = [(f"{measure.title} by step", "eval", score[1]), ("TAID's t by step", "train", "taid/t")]
    figures = []
    for facet in facets(sweep, [lines]):
        chosen = [result for result in results if _within(result.run, facet)]
        metrics = {result.run.folder: read_metrics(result.run.folder) for result in chosen}
        for title, kind, key in kinds:
            series = []
            for name, css in shown.items() or [("mean", "c0")]:
                own = [metrics[r.run.folder] for r in chosen if lines is None or r.run.setting[lines] == name]
                series.append(_curve(own, name, css, kind, key, score[0]))
            series = [line for line in series if len(line.points) > 1]
            caption = " · ".join([title, *facet.values()])
            percent = measure.unit == "%" and kind == "eval"
            figures.append((caption, plots.line_chart(caption, series, x_label="steps", percent=percent)))
    return [(caption, chart) for caption, chart in figures if chart]


def _curve(
    runs: Sequence[Sequence[Mapping[str, object]]], name: str, css: str, kind: str, key: str, data: str
) -> plots.Series:
    """Return mean and deviation over seeds, at the steps that all seeds have."""
    by_step: dict[float, list[float]] = {}
    for lines in runs:
        for step, value in plots.thinned(list(_points(lines, kind, key, data))):
            by_step.setdefault(step, []).append(value)
    points, band = [], []
    for step, values in sorted(by_step.items()):
        if len(values) == len(runs):
            mean, deviation = sum(values) / len(values), deviation_of(values) or 0.0
            points.append((step, mean))
            band.append((step, mean - deviation, mean + deviation))
    return plots.Series(name, css, points, band=band if len(runs) > 1 else ())


def _points(lines: Sequence[Mapping[str, object]], kind: str, key: str, data: str) -> Iterator[plots.Point]:
    for line in lines:
        if line.get("kind") != kind or (kind == "eval" and line.get("data") != data):
            continue
        step, value = line.get("step"), line.get(key)
        if is_number(step) and is_number(value):
            yield float(step), float(value)  # type: ignore[arg-type]


def _within(run: RecordedRun, facet: Mapping[str, str]) -> bool:
    return all(run.setting[axis] == name for axis, name in facet.items())
