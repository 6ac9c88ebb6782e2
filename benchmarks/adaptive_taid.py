"""How TAID's schedule `adaptive` answers to students that learn fast, slowly and not at all, for docs/taid.md.

    python benchmarks/adaptive_taid.py [--steps 400] [--seeds 2] [--jobs 2]

Trains the demo's student (configs/demo/taid.yaml, one rank of one thread a run): in full; the
projector alone; and at a learning rate that changes nothing. Writes t at every twentieth of each run, and the
gap KL(p_t‖q)/t² that it follows, to benchmarks/results/adaptive_taid.csv. Complete runs in --out are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from vlm_distill.demo import prepare

T_START = 0.2
STUDENTS = {"easy": [], "hard": ["student.train=[projector]"], "stalled": ["optimizer.lr=1e-9"]}
SHARES = [0.1, 0.25, 0.5, 0.75, 0.9, 1.0]


def train(student: str, seed: int, out: Path, data: Path, steps: int) -> list[dict[str, object]]:
    """Train, unless ``out`` has the run already; return t and the gap over the run."""
    folder = out / f"{student}_{steps}_{seed}"
    if not (folder / "summary.json").exists():
        overrides = [
            *STUDENTS[student],
            f"loss=[{{name: taid, t_start: {T_START}, schedule: adaptive}}]",
            "student.tokenizer=configs/demo/teacher",
            f"data.train=[{{path: {data / 'unlabelled.jsonl'}, labelled: false}}]",
            "data.eval=[]",
            "data.workers=1",
            f"training.steps={steps}",
            f"training.seed={seed}",
            "training.keep_checkpoints=1",
            f"output={folder}",
        ]
        command = [sys.executable, "-m", "vlm_distill.train", "configs/demo/taid.yaml", *overrides]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{folder}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    # A step logs its KL, at the t of the step before, and the t after it.
    before = [T_START, *(line["taid/t"] for line in lines)]
    return [
        {
            "student": student,
            "seed": seed,
            "step": step,
            "share": step / steps,
            "t": round(lines[step - 1]["taid/t"], 4),
            "gap": round(
                statistics.mean(lines[i]["taid/kl"] / before[i] ** 2 for i in range(step - steps // 20, step)), 4
            ),
        }
        for step in range(steps // 20, steps + 1, steps // 20)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of 20")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/adaptive_taid.csv"))
    options = parser.parse_args()
    data = prepare(options.out / "data")
    runs = list(product(STUDENTS, range(options.seeds)))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda run: train(*run, options.out, data, options.steps), runs))
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0][0])
        writer.writeheader()
        writer.writerows(row for result in results for row in result)

    print("t (gap) after        " + "  ".join(f"{share:>12.0%}" for share in SHARES))
    for (student, seed), rows in zip(runs, results, strict=True):
        values = {row["share"]: f"{row['t']:.2f} ({row['gap']:.2f})" for row in rows}
        print(f"{student:8} seed {seed:<6}" + "  ".join(f"{values[share]:>12}" for share in SHARES))
    print("the line             " + "  ".join(f"{T_START + (1 - T_START) * share:>12.2f}" for share in SHARES))


if __name__ == "__main__":
    main()
