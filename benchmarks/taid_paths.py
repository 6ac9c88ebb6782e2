"""What t does under each schedule of TAID, and where it differs from the straight line, for docs/study.md.

    python benchmarks/taid_paths.py runs/study/teacher_size [runs/study/losses-three_seeds …]

Reads the finished runs of sweeps whose loss is TAID, language models and classifiers alike. Writes a row for each run
to benchmarks/results/study_t.csv: t over the run, how far it leads or trails the line at most, and in which share of
the steps it is off the line at all. Prints each schedule's means over runs, and how many of them differ from the line.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill.config.file import read_saved
from vlm_distill.reporting.run_folder import read_metrics
from vlm_distill.sweeping.record import RecordedRun, read_record

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
#: Two values of t that differ by rounding are the same.
ROUNDING = 1e-9


def taid_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a run's first TAID term with its parameters; ``None`` if it has none."""
    terms = [term for term in config["loss"] if term["name"] == "taid"]
    return {"t_start": 0.4, "t_end": 1.0, "schedule": "paper", **terms[0]} if terms else None


def row_of(run: RecordedRun) -> dict[str, Any] | None:
    """Return what t did in a run; ``None`` for a run without TAID."""
    taid = taid_of(read_saved(run.folder / "config.yaml"))
    if taid is None:
        return None
    # A step's line has the t that its end computed, with as many steps finished before it as its index.
    path = [float(line["taid/t"]) for line in read_metrics(run.folder) if "taid/t" in line]
    steps = len(path)
    line = [taid["t_start"] + (taid["t_end"] - taid["t_start"]) * step / steps for step in range(steps)]
    # The first step only stores its loss, so that t is at the line of the step before.
    gaps = [t - straight for t, straight in zip(path, line, strict=True)]
    row = {"sweep": run.folder.parent.parent.name, "setting": run.folder.parent.name, "seed": run.seed}
    row |= {"schedule": taid["schedule"], "t_start": taid["t_start"], "steps": steps}
    row |= {f"t_{share:.0%}": round(path[max(1, round(share * steps)) - 1], 4) for share in SHARES}
    off = sum(abs(gap) > ROUNDING for gap in gaps)
    leads, trails = (round(max(0.0, *ends), 6) for ends in (gaps, [-gap for gap in gaps]))
    return row | {"leads": leads, "trails": trails, "off_line": round(off / steps, 4)}


def rows_of(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield a row for each finished run with TAID; runs that settings share count once."""
    for folder in folders:
        runs = {run.folder: run for run in read_record(folder).runs if run.done}
        for run in runs.values():
            row = row_of(run)
            if row is not None:
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of sweeps")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/study_t.csv"))
    options = parser.parse_args()
    rows = list(rows_of(options.sweeps))
    if not rows:
        sys.exit("no finished run of these sweeps has TAID")
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    shares = " | ".join(f"{share:.0%}" for share in SHARES)
    print(f"| sweep | schedule | runs | steps | {shares} | leads | trails | off the line |")
    print(f"|---|---|---|---|{'---|' * len(SHARES)}---|---|---|")
    for sweep, schedule, steps in dict.fromkeys((row["sweep"], row["schedule"], row["steps"]) for row in rows):
        own = [r for r in rows if (r["sweep"], r["schedule"], r["steps"]) == (sweep, schedule, steps)]
        means = " | ".join(f"{statistics.mean(row[f't_{share:.0%}'] for row in own):.2f}" for share in SHARES)
        leads, trails = max(row["leads"] for row in own), max(row["trails"] for row in own)
        off = sum(row["off_line"] > 0 for row in own)
        ends = f"{leads:.3f} | {trails:.3f} | {off} of {len(own)}"
        print(f"| {sweep} | {schedule} | {len(own)} | {steps} | {means} | {ends} |")


if __name__ == "__main__":
    main()
