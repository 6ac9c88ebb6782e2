"""What the demo's student gains by distillation: losses, labels and seeds, for docs/demo.md.

    python benchmarks/demo_study.py [--steps 500] [--seeds 5] [--jobs 2]

Trains the demo's student (configs/demo) in every setting of ARMS, one rank of one thread a run, in the two
micro-batches that the demo's two ranks have. Runs of one seed have the same first weights. Writes every evaluation to
benchmarks/results/demo_study.csv: accuracy on all test questions at the end, on an even share of 1,000 before, with the
seconds of training until then (evaluations not counted). Runs that are complete in --out are not run again. Prints
each setting's final accuracy (mean and standard deviation over seeds), and by how much TAID without labels exceeds it,
paired by seed, with the 95 % t-interval.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from vlm_distill.demo import prepare

CONFIGS = Path("configs/demo")
LOSSES = {
    "taid": [str(CONFIGS / "taid.yaml")],
    "forward_kl": [str(CONFIGS / "taid.yaml"), "loss=[{name: forward_kl}]"],
    "cross_entropy": [str(CONFIGS / "cross_entropy.yaml")],
}
# 97.5th percentile of Student's t by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Arm(NamedTuple):
    """A setting: the loss, the file of training data, and the number of its rows (None: all)."""

    loss: str
    data: str
    rows: int | None

    @property
    def name(self) -> str:
        return f"{self.loss}_{self.data}_{self.rows or 'all'}"


WITHOUT_LABELS = Arm("taid", "unlabelled", None)
ARMS = [
    Arm("cross_entropy", "train", 500),
    WITHOUT_LABELS,
    Arm("taid", "train", 500),
    Arm("cross_entropy", "train", None),
    Arm("forward_kl", "unlabelled", None),
]


def train(arm: Arm, seed: int, out: Path, data: Path, steps: int) -> list[dict[str, object]]:
    """Train, unless ``out`` has the run already; return its evaluations."""
    folder = out / f"{arm.name}_{steps}_{seed}"
    if not (folder / "summary.json").exists():
        source = f"{{path: {data / arm.data}.jsonl, labelled: {str(arm.data == 'train').lower()}"
        source += "}" if arm.rows is None else f", limit: {arm.rows}}}"
        overrides = [
            f"student.tokenizer={CONFIGS / 'teacher'}",
            f"data.train=[{source}]",
            f"data.eval=[{{path: {data / 'test.jsonl'}}}]",
            "data.workers=1",
            f"training.steps={steps}",
            f"training.seed={seed}",
            "training.micro_batch_size=32",
            "training.keep_checkpoints=1",
            "evaluation.every=100",
            "evaluation.limit=1000",
            "evaluation.teacher=false",
            f"output={folder}",
        ]
        command = [sys.executable, "-m", "vlm_distill.train", *LOSSES[arm.loss], *overrides]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder}: {done.stderr[-2000:]}")
    rows: list[dict[str, object]] = []
    evaluating, trained = 0.0, 0.0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":
            trained = line["seconds"] - evaluating
            continue
        evaluating += line["n"] / line["answers_per_second"]
        rows.append(
            {
                **arm._asdict(),
                "seed": seed,
                "step": line["step"],
                "seconds": round(trained, 1),
                "questions": line["n"],
                "accuracy": round(line["exact"], 4),
            }
        )
    print(f"{folder.name}: {rows[-1]['accuracy']} after {rows[-1]['seconds']} s", flush=True)
    return rows


def interval(differences: list[float]) -> tuple[float, float]:
    """Return the mean and half the 95 % t-interval."""
    n = len(differences)
    return statistics.mean(differences), T_975[n - 1] * statistics.stdev(differences) / math.sqrt(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/demo_study.csv"))
    options = parser.parse_args()
    data = prepare(options.out / "data")
    runs = list(product(ARMS, range(options.seeds)))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda run: train(*run, options.out, data, options.steps), runs))
    rows = [row for result in results for row in result]
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    final = {run: 100 * float(str(result[-1]["accuracy"])) for run, result in zip(runs, results, strict=True)}
    best = [final[WITHOUT_LABELS, seed] for seed in range(options.seeds)]
    for arm in ARMS:
        values = [final[arm, seed] for seed in range(options.seeds)]
        mean, half = interval([a - b for a, b in zip(best, values, strict=True)])
        told = f"{arm.name:28} {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %"
        print(told if arm == WITHOUT_LABELS else f"{told}   TAID without labels: {mean:+.1f} ± {half:.1f} points")


if __name__ == "__main__":
    main()
