"""The table of a sweep: each setting's mean and deviation over seeds, and its difference from the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlm_distill.evaluation.seed_statistics import SeedComparison, compare_seeds, deviation_of, holm

from .record import SweepRecord
from .results import MEASURES, Result, main_scores

Setting = tuple[str, ...]
SIGNIFICANT = 0.05
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
    against: dict[Setting, SeedComparison] = {}
    for setting, values in found.items():
        other = baseline_of(sweep, setting)
        if other is not None and other != setting and other in found:
            against[setting] = compare_seeds(values, found[other])
    verdicts = _verdicts(against, lower=MEASURES[measure].lower)
    return [Row(setting, values, against.get(setting), verdicts.get(setting, "")) for setting, values in found.items()]


def baseline_of(sweep: SweepRecord, setting: Setting) -> Setting | None:
    """Return the setting that this one is compared with; ``None`` if the sweep compares nothing."""
    if sweep.baseline is None:
        return None
    axis, name = sweep.baseline
    return tuple(name if key == axis else own for key, own in zip(sweep.axes, setting, strict=True))


def _verdicts(against: Mapping[Setting, SeedComparison], *, lower: bool) -> dict[Setting, str]:
    tested = {setting: found.p for setting, found in against.items() if found.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    verdicts = {}
    for setting, found in against.items():
        if setting not in adjusted:
            verdicts[setting] = "too few seeds"
        elif adjusted[setting] >= SIGNIFICANT:
            verdicts[setting] = "no difference shown"
        else:
            verdicts[setting] = "better" if (found.difference < 0) == lower else "worse"
    return verdicts


def tables(sweep: SweepRecord, results: Sequence[Result]) -> list[Table]:
    """Return a table for the terminal of each data set and measure."""
    return [_table(sweep, results, data, measure) for data, measure in main_scores(result.scores for result in results)]


def _table(sweep: SweepRecord, results: Sequence[Result], data: str, measure: str) -> Table:
    table = Table(title=f"{data}: {MEASURES[measure].title}", title_justify="left", box=SIMPLE_HEAD)
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
    if verdict != "no difference shown":
        return [difference, verdict, ""]
    needed = "over 1,000" if found.needed is None else f"{found.needed:,}"
    return [difference, verdict, needed]


def spread(mean: float, beside: float | None, sign: str = "") -> str:
    """Format a mean and what is beside it, such as ``83.6 ± 2.0``, with as many decimals as the spread is known to."""
    digits = decimals(beside if beside else mean)
    text = f"{mean:{sign}.{digits}f}".replace("-", "−")
    return text if beside is None else f"{text} ± {beside:.{digits}f}"


def decimals(size: float) -> int:
    """Return decimals that show two significant digits of ``size``, at least one and at most four."""
    if not size:
        return 1
    return min(4, max(1, 1 - math.floor(math.log10(abs(size)))))
