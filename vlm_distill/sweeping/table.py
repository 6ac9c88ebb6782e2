"""The table of a sweep: each setting's mean and deviation over seeds, and its difference from the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlm_distill.evaluation.measures import MEASURES
from vlm_distill.evaluation.seed_statistics import SeedComparison, compare_seeds, deviation_of, verdicts
from vlm_distill.reporting.plots import needed, spread

from .record import SweepRecord
from .results import Result, main_scores

Setting = tuple[str, ...]
LEGEND = (
    "sd: over seeds. Differences are paired by seed, with the 95 % t interval; the verdict is at 5 % after Holm's "
    "correction over the table. needed: seeds that would show such a difference in four of five studies."
)


@dataclass(frozen=True)
class Row:
    """A setting's scores of one measure.

    Attributes:
        setting: names of its choices, in the order of the axes.
        values: scores by seed, as tables show them (accuracies in per cent).
        against: its difference from its baseline; ``None`` for a baseline, and where that has no score.
        verdict: ``better``, ``worse`` or ``no difference shown``, at 5 % after Holm's correction over all rows.
    """

    setting: Setting
    values: Mapping[int, float]
    against: SeedComparison | None = None
    verdict: str = ""

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return sum(self.values.values()) / len(self.values)

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation over seeds; ``None`` for one seed."""
        return deviation_of(list(self.values.values()))


def rows_of(sweep: SweepRecord, results: Sequence[Result], data: str, measure: str) -> list[Row]:
    """Return a row for each setting with a score of this measure, in the sweep's order."""
    scale = MEASURES[measure].scale
    found: dict[Setting, dict[int, float]] = {}
    for result in results:
        if (data, measure) in result.scores:
            setting = tuple(result.run.setting[axis] for axis in sweep.axes)
            found.setdefault(setting, {})[result.run.seed] = scale * result.scores[data, measure]

    # Compare each setting with its baseline: the same setting, but for the baseline's axis.
    compared: dict[Setting, Setting] = {}
    for setting in found:
        other = baseline_of(sweep, setting)
        if other is not None and other != setting and other in found:
            compared[setting] = other
    against = {own: compare_seeds(found[own], found[other], len(compared)) for own, other in compared.items()}
    told = dict(zip(against, verdicts(list(against.values()), lower=MEASURES[measure].lower), strict=True))
    return [Row(setting, values, against.get(setting), told.get(setting, "")) for setting, values in found.items()]


def baseline_of(sweep: SweepRecord, setting: Setting) -> Setting | None:
    """Return the setting that this one is compared with; ``None`` if the sweep compares nothing."""
    if sweep.baseline is None:
        return None
    axis, name = sweep.baseline
    return tuple(name if key == axis else own for key, own in zip(sweep.axes, setting, strict=True))


def tables(sweep: SweepRecord, results: Sequence[Result]) -> list[Table]:
    """Return a table for the terminal of each data set and measure."""
    return [_table(sweep, results, data, measure) for data, measure in main_scores(result.scores for result in results)]


def _table(sweep: SweepRecord, results: Sequence[Result], data: str, measure: str) -> Table:
    table = Table(title=f"{data}: {MEASURES[measure].heading}", title_justify="left", box=SIMPLE_HEAD)
    for axis in sweep.axes or ["setting"]:
        table.add_column(axis)
    compared = sweep.baseline is not None
    table.add_column("seeds", justify="right")
    table.add_column("mean ± sd", justify="right")
    if compared:
        table.add_column("− baseline ± 95 %", justify="right")
        table.add_column("verdict")
        table.add_column("needed", justify="right")
    for row in rows_of(sweep, results, data, measure):
        cells = list(row.setting) or [results[0].run.folder.parent.name]
        cells += [str(len(row.values)), spread(row.mean, row.deviation)]
        if compared:
            cells += _compared(row.against, row.verdict)
        table.add_row(*cells)
    return table


def _compared(found: SeedComparison | None, verdict: str) -> list[str]:
    if found is None:
        return ["", "", ""]
    difference = spread(found.difference, found.half, sign="+")
    return [difference, verdict, needed(found, verdict)]
