"""What the classification demo's student gains by distillation: ten ways, five seeds, for docs/vision.md.

    python benchmarks/vision_study.py [--seeds 5] [--jobs 2]

Trains the student of configs/demo/vision on Fashion-MNIST alone and by every method of METHODS, for the same number
of steps. Runs of one seed have the same images, order and first weights. All have the same teacher.

Each method has the learning rate of LEARNING_RATES that is best on the last 10,000 training images, which are
held out, with a separate seed; the scores of that choice go to benchmarks/results/vision_study_lr.csv. Then come the
runs that count, on the test split: benchmarks/results/vision_study.csv has a row for each. Complete runs in --out are
not run again. Prints each method's mean with the 95 % t-interval over seeds, and its differences to the student alone
and to KD, paired by seed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vision.demo import Job, prepare, processes, train

CROSS_ENTROPY = "{name: cross_entropy, weight: %s}"
# Weights and temperatures were chosen by a few runs on the held-out images; the page says how many for each method.
METHODS = {
    "alone": [CROSS_ENTROPY % 1.0],
    "kd": ["{name: kd, temperature: 1.0, weight: 0.9}", CROSS_ENTROPY % 0.1],
    "kd_standardise": ["{name: kd, temperature: 2.0, weight: 0.9, standardise: true}", CROSS_ENTROPY % 0.1],
    "dkd": ["{name: dkd, alpha: 1.0, beta: 1.0, temperature: 1.0, weight: 0.5}", CROSS_ENTROPY % 0.5],
    "ctkd": ["{name: ctkd, t_range: 3.0, loops: 1, weight: 0.5}", CROSS_ENTROPY % 0.5],
    "mlkd": ["{name: mlkd, temperatures: [1.0, 1.5, 2.0], weight: 0.01}", CROSS_ENTROPY % 0.5],
    "dist": ["{name: dist, weight: 0.5}", CROSS_ENTROPY % 0.5],
    "taid_paper": ["{name: taid, schedule: paper}"],
    "taid_linear": ["{name: taid, schedule: linear}"],
    "taid_adaptive": ["{name: taid, schedule: adaptive}"],
}
WEAK = "{crop: resize, hflip: 0.5, color_jitter: 0}"
STRONG = "{crop: resize, hflip: 0.5, color_jitter: 0, auto_augment: rand-m4-n1-inc1}"
VIEWS = {"mlkd": [WEAK, STRONG]}
LEARNING_RATES = (0.2, 0.4)
TRIAL_SEED = 100
RESULTS = Path("benchmarks/results")


def listed(items: Iterable[str]) -> str:
    return f"[{', '.join(items)}]"


def job(method: str, lr: float, seed: int, folder: Path, data: Path, scored: Path, teacher: Path) -> Job:
    """A run with a method's losses, trained on ``data``, scored on the test split of ``scored``."""
    overrides = [
        f"loss={listed(METHODS[method])}",
        f"data.views={listed(VIEWS.get(method, [WEAK]))}",
        f"data.train.0.path={data}",
        f"data.eval.0.path={scored}",
        f"optimizer.lr={lr}",
        f"training.seed={seed}",
        f"output={folder}",
    ]
    if method != "alone":
        overrides.append(f"teacher.name={teacher / 'student'}")
    return Job("alone.yaml" if method == "alone" else "kd.yaml", tuple(overrides), folder)


def split(data: Path, folder: Path, train: int = 20_000, held_out: int = 10_000) -> Path:
    """A folder whose training split is the first training images, and whose test split is the last ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        content = gzip.decompress((data / f"train-{kind}-ubyte.gz").read_bytes())
        shape = np.frombuffer(content, ">u4", dimensions, 4)
        rows = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
        for part, chosen in (("train", rows[:train]), ("t10k", rows[-held_out:])):
            head = content[:4] + np.array(chosen.shape, ">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + chosen.tobytes())
    return folder


def run(pool: Executor, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the scores of all jobs; complete ones are not run again."""

    def complete(one: Job) -> bool:
        return (one.folder / "summary.json").exists()

    for folder in pool.map(train, [one for one in jobs if not complete(one)]):
        print(folder, f"{scores(folder)['top1']:.4f}", flush=True)
    return [scores(one.folder) for one in jobs]


def scores(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "evaluation" / "test" / "student" / "scores.json").read_text("utf-8"))
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    rounded = {"top1": found["exact"], "nll": round(found["nll"], 4), "ece": round(found["ece"], 4)}
    return rounded | {"seconds": round(summary["seconds"], 1)}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    # Imported late: PyTorch must not be loaded before a process has its share of the cores.
    from vlm_distill.evaluation.seed_statistics import t_interval

    return t_interval(values)


def told(values: Sequence[float], sign: str = "") -> str:
    mean, half = interval([100 * value for value in values])
    return f"{mean:{sign}.2f} ± {half or 0:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("runs/vision-study"))
    options = parser.parse_args()
    out: Path = options.out
    whole, title = prepare(out / "data")
    if title != "Fashion-MNIST":
        sys.exit("the study needs Fashion-MNIST: install Debian's package dataset-fashion-mnist")
    # The reader takes the classes' names from this file name.
    data = split(whole, out / "fashion-mnist-split")
    teacher = out / "teacher"
    paths = (f"data.train.0.path={data}", f"data.eval.0.path={whole}", "training.steps=1000", f"output={teacher}")
    with processes(options.jobs, out / "log") as pool:
        print(f"teacher: {run(pool, [Job('teacher.yaml', paths, teacher)])[0]}", flush=True)
        trials = list(product(METHODS, LEARNING_RATES))
        places = [out / "trials" / f"{method}_{lr}" for method, lr in trials]
        found = run(
            pool,
            [job(m, lr, TRIAL_SEED, at, data, data, teacher) for (m, lr), at in zip(trials, places, strict=True)],
        )
        tried = {trial: score["top1"] for trial, score in zip(trials, found, strict=True)}
        write(
            RESULTS / "vision_study_lr.csv",
            [{"method": method, "lr": lr, "validation_top1": top1} for (method, lr), top1 in tried.items()],
        )
        best = {method: max(LEARNING_RATES, key=lambda lr: tried[method, lr]) for method in METHODS}
        runs = list(product(range(options.seeds), METHODS))
        found = run(pool, [job(m, best[m], s, out / m / f"seed{s}", data, whole, teacher) for s, m in runs])
    rows = [{"method": m, "lr": best[m], "seed": s} | score for (s, m), score in zip(runs, found, strict=True)]
    rows.sort(key=lambda row: list(METHODS).index(row["method"]))
    write(RESULTS / "vision_study.csv", rows)

    by_method = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    print("| method | lr | top-1, % | − alone | − KD | NLL | ECE, % | seconds |\n|---|---|---|---|---|---|---|---|")
    for method, mine in by_method.items():
        top1 = [row["top1"] for row in mine]
        gaps = [
            "" if method == other else told([a - b["top1"] for a, b in zip(top1, by_method[other], strict=True)], "+")
            for other in ("alone", "kd")
        ]
        nll, _ = interval([row["nll"] for row in mine])
        ece, _ = interval([100 * row["ece"] for row in mine])
        seconds, _ = interval([row["seconds"] for row in mine])
        print(
            f"| {method} | {best[method]} | {told(top1)} | {' | '.join(gaps)} | {nll:.3f} | {ece:.1f} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
