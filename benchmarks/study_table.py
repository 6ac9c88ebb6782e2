"""A committed sweep.csv as the Markdown tables of docs/study.md: means, deviations and differences from a baseline.

    python benchmarks/study_table.py benchmarks/results/study_teacher_size.csv cross_entropy

Differences are paired by seed, with the 95 % t interval; verdicts are at 5 % after Holm's correction over the table, as
on the sweep's own page. `--score data.name` chooses one score; there is one for each type of questions.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm_distill.evaluation.measures import MEASURES
from vlm_distill.reporting.plots import spread
from vlm_distill.sweeping.record import RecordedRun, SweepRecord
from vlm_distill.sweeping.results import Result, main_scores
from vlm_distill.sweeping.table import rows_of

#: Columns of a sweep.csv that are no scores.
OTHERS = ("seconds", "peak_bytes", "student_parameters", "teacher_parameters", "folder")


def read_results(path: Path) -> tuple[list[str], list[Result]]:
    """Return a table's axes and its runs."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        rows = list(reader)
    axes = columns[: columns.index("seed")]
    results = []
    for row in rows:
        scores = {}
        for column in columns[len(axes) + 1 :]:
            if column not in OTHERS and row[column]:
                data, _, name = column.rpartition(".")
                scores[data, name] = float(row[column])
        run = RecordedRun({axis: row[axis] for axis in axes}, {}, int(row["seed"]), Path(row["folder"]))
        results.append(Result(run, scores, {}, float(row["seconds"] or 0), None, {}))
    return axes, results


def find_baseline(axes: Sequence[str], results: Sequence[Result], name: str) -> tuple[str, str]:
    """Return the axis that has a setting of this name, and the name."""
    for axis in axes:
        if any(result.run.setting[axis] == name for result in results):
            return axis, name
    sys.exit(f"no setting {name!r} in this table")


def lines(sweep: SweepRecord, results: Sequence[Result], data: str, measure: str) -> Iterator[str]:
    """Yield the lines of a score's table."""
    assert sweep.baseline is not None
    heads = [*sweep.axes, "seeds", f"{data}: {MEASURES[measure].heading}", f"− `{sweep.baseline[1]}`", "verdict"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows_of(sweep, results, data, measure):
        cells = [f"`{name}`" for name in row.setting]
        cells += [str(len(row.values)), spread(row.mean, row.deviation)]
        difference = row.against
        cells.append("" if difference is None else spread(difference.difference, difference.half, sign="+"))
        cells.append(row.verdict)
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="a sweep.csv")
    parser.add_argument("baseline", help="setting that the others are compared with")
    parser.add_argument("--score", help="such as test.exact; by default every main score")
    options = parser.parse_args()
    axes, results = read_results(options.csv)
    baseline = find_baseline(axes, results, options.baseline)
    sweep = SweepRecord(options.csv.stem, options.csv.parent, axes, baseline, [result.run for result in results])
    for data, measure in main_scores(result.scores for result in results):
        if options.score in (None, f"{data}.{measure}"):
            print("\n".join(lines(sweep, results, data, measure)) + "\n")


if __name__ == "__main__":
    main()
