"""What the demo's student gains by distillation: losses × labels × seeds, for docs/demo.md.

    python benchmarks/demo_study.py [--labels 500 2000 8000] [--steps 400] [--seeds 5] [--jobs 2]

Trains the demo's student (configs/demo) with every loss on the first so many training questions, one rank of one thread
a run, in the two micro-batches that the demo's two ranks have. Runs that are to be compared have the same seed, and so
the same first weights and the same order of the data. Writes every evaluation to
benchmarks/results/demo_study.csv: accuracy on all test questions at the end, on an even share of them before, with the
seconds of training until then (evaluations not counted). Runs that are complete in --out are not run again. Prints the
table of final accuracies, and of TAID's differences to the other losses, paired by seed, with their 95 % t-interval.
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


class Run(NamedTuple):
    labels: int
    seed: int
    loss: str


def train(run: Run, out: Path, data: Path, steps: int) -> list[dict[str, object]]:
    """One training, unless ``out`` holds it already; its evaluations."""
    folder = out / f"{run.loss}_{run.labels}_{steps}_{run.seed}"
    if not (folder / "summary.json").exists():
        overrides = [
            f"student.tokenizer={CONFIGS / 'teacher'}",
            f"data.train=[{{path: {data / 'train.jsonl'}, limit: {run.labels}}}]",
            f"data.eval=[{{path: {data / 'test.jsonl'}}}]",
            "data.workers=1",
            f"training.steps={steps}",
            f"training.seed={run.seed}",
            "training.micro_batch_size=32",
            "training.keep_checkpoints=1",
            "evaluation.every=100",
            "evaluation.limit=1000",
            "evaluation.teacher=false",
            f"output={folder}",
        ]
        command = [sys.executable, "-m", "vlm_distill.train", *LOSSES[run.loss], *overrides]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder}: {done.stderr[-2000:]}")
        print(folder.name, done.stdout.strip().splitlines()[-2:], flush=True)
    rows, evaluating, trained = [], 0.0, 0.0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":
            trained = line["seconds"] - evaluating
        else:
            evaluating += line["n"] / line["answers_per_second"]
            rows.append({**run._asdict(), "step": line["step"], "seconds": round(trained, 1), "questions": line["n"]})
            rows[-1]["accuracy"] = round(line["exact"], 4)
    return rows


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half the 95 % t-interval."""
    n = len(differences)
    return statistics.mean(differences), T_975[n - 1] * statistics.stdev(differences) / math.sqrt(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/demo_study.csv"))
    options = parser.parse_args()
    data = prepare(options.out / "data")
    runs = [Run(*key) for key in product(options.labels, range(options.seeds), LOSSES)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda run: train(run, options.out, data, options.steps), runs))
    rows = [row for result in results for row in result]
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    final = {run: 100 * float(result[-1]["accuracy"]) for run, result in zip(runs, results, strict=True)}
    for labels in options.labels:
        for loss in LOSSES:
            values = [final[Run(labels, seed, loss)] for seed in range(options.seeds)]
            line = f"{labels:6} labels  {loss:13}  {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %"
            if loss != "taid":
                taid = [final[Run(labels, seed, "taid")] for seed in range(options.seeds)]
                mean, half = interval([a - b for a, b in zip(taid, values, strict=True)])
                line += f"   TAID − it: {mean:+.1f} ± {half:.1f} points"
            print(line)


if __name__ == "__main__":
    main()
