"""SmolLM2-135M pruned to half of its size by several rules, before and after a short distillation, for docs/pruning.md.

    PYTHONPATH=runs/smollm2/packages:. python benchmarks/pruning_study.py [--steps 16] [--seeds 3] [--jobs 2]

Teacher, text and what must be installed: benchmarks/smollm2_study.py. Students keep 11 of 30 layers, chosen by RULES,
or all layers with two thirds of the width, the heads and the neurons. `influence` and `activation` are measured on
the first training samples of a run with seed 0; random choices have the seed of their run. Training is that of
configs/language/smollm2_every_third.yaml with forward KL; rules in UNTRAINED are measured before it alone. Runs of one
seed read the same rows in the same order, so that a fixed rule's runs differ by that order alone.
benchmarks/results/pruning_study.csv gets a row for each run. What is complete in --out is not done again, student by
student and run by run; weights of complete runs are deleted. Prints means over seeds, and differences paired by seed
with 95 % t-intervals. --single also measures one size at a time.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from smollm2_study import CONFIG, MEASURES, measured, run, write_data, write_teacher

from vlm_distill.evaluation.seed_statistics import t_interval

LAYERS = 11
WIDTHS = {"width": 384, "heads": 6, "neurons": 1024}
#: What is kept, as in `student.from_teacher`; a rule that begins with "random" draws as much of it by chance.
RULES: dict[str, dict[str, Any]] = {
    "influence": {"layers": LAYERS, "by": "influence"},
    "spaced": {"layers": LAYERS, "by": "spaced"},
    "first": {"layers": LAYERS, "by": "first"},
    "random layers": {"layers": LAYERS},
    "activation": WIDTHS,
    "random sizes": WIDTHS,
}
#: Measured before training alone: it looks at nothing, as `first` does, and lies between this and `influence`.
UNTRAINED = ("spaced",)
#: One size at a time, measured before training alone, with one draw.
SINGLE: dict[str, dict[str, Any]] = {}
for size, kept in WIDTHS.items():
    # With all nine heads, Llama's width is a multiple of nine.
    SINGLE[f"activation, {size}"] = SINGLE[f"random {size}"] = {size: 387 if size == "width" else kept}
#: Rules that are compared with others: the measured ones with those that look at nothing.
PAIRS = {"influence": ("first", "random layers"), "activation": ("random sizes",)}
#: A rule and the seed of its draw or of its run.
Key = tuple[str, int]


def random_choice(section: dict[str, Any], stack: Any, seed: int) -> Any:
    """Return what a student keeps if it is drawn by chance."""
    from vlm_distill.models.pruning import Kept

    drawn = random.Random(seed)

    def some(count: int, total: int) -> list[int]:
        return sorted(drawn.sample(range(total), count))

    kept: dict[str, Any] = {}
    layers = range(len(stack))
    if "layers" in section:
        kept["layers"] = some(section["layers"], len(stack))
    if "neurons" in section:
        kept["neurons"] = [some(section["neurons"], stack.neurons) for _ in layers]
    if "heads" in section:
        kept["groups"] = [some(section["heads"] * stack.groups // stack.heads, stack.groups) for _ in layers]
    if "width" in section:
        kept["channels"] = some(section["width"], stack.width)
    return Kept(**kept)


def name_of(rule: str) -> str:
    """Return a rule's name in files."""
    return rule.replace(",", "").replace(" ", "_")


def draws(rule: str, seeds: int) -> range:
    """Return the seeds of a rule's students; a rule that is not random has one student."""
    return range(seeds if rule.startswith("random") and rule in RULES else 1)


def write_students(
    rules: Sequence[str], teacher: Path, data: Path, out: Path, seeds: int
) -> Iterator[tuple[Key, Path]]:
    """Prune the teacher by every rule, unless that is done; yield rule and seed, and the student's folder."""
    from vlm_distill.config.file import load_config
    from vlm_distill.models.plain_layers import find_stack
    from vlm_distill.models.pruning import pruned
    from vlm_distill.run import Run
    from vlm_distill.runtime.processes import Processes

    processes = Processes("cpu")
    for rule in rules:
        section = (RULES | SINGLE)[rule]
        for seed in draws(rule, seeds):
            folder = out / f"{name_of(rule)}_{seed}"
            yield (rule, seed), folder / "student"
            if (folder / "student").exists():
                continue
            overrides = [f"teacher.path={teacher}", f"data.train.0.path={data / 'train.jsonl'}", f"output={folder}"]
            # The configuration's own choice of layers goes.
            overrides.append(f"student.from_teacher={json.dumps({'layers': None} | section)}")
            parts = Run(load_config(CONFIG, overrides), processes)
            if not rule.startswith("random"):
                student = parts.student
            else:
                assert parts.teacher is not None
                assert parts.teacher.model is not None
                whole = parts.teacher.model
                student = pruned(whole, {"decoder": random_choice(section, find_stack(whole, "decoder"), seed)})
            # A student that was not written to its end has no name.
            unfinished = folder / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            student.save_pretrained(unfinished)
            unfinished.rename(folder / "student")
    processes.close()


def train(student: Path, seed: int, folder: Path, teacher: Path, data: Path, steps: int) -> dict[str, Any]:
    """Train, unless ``folder`` has the run already; return its final scores."""
    if not (folder / "summary.json").exists():
        run(
            "vlm_distill.train",
            CONFIG,
            f"student.path={student}",
            "loss=[{name: forward_kl}]",
            f"teacher.path={teacher}",
            f"data.train.0.path={data / 'train.jsonl'}",
            f"data.eval.0.path={data / 'held_out.jsonl'}",
            f"training.steps={steps}",
            f"training.seed={seed}",
            f"output={folder}",
        )
    for weights in ("checkpoints", "student"):
        shutil.rmtree(folder / weights, ignore_errors=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["kind"] != "train"][-1]
    print(f"{folder.name}: {scores}", flush=True)
    return {name: scores[name] for name in (*MEASURES, "tokens")}


def parameters(folder: Path) -> int:
    """Return the number of a student's parameters."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def spread(values: Sequence[float]) -> str:
    """Return the mean of some values, with their standard deviation if there are several."""
    deviation = f" ± {statistics.stdev(values):,.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.3f}{deviation}"


def report(found: dict[Key, dict[str, Any]], seeds: int) -> None:
    """Print means over seeds, and paired differences."""
    rules = list(dict.fromkeys(rule for rule, _ in found))
    for rule in rules:
        runs = [found[rule, seed] for seed in range(seeds)]
        means = []
        for name in ("perplexity_before", "kl_before", "perplexity", "kl"):
            means.append(f"{name} {spread([one[name] for one in runs])}")
        print(f"{rule:14} {runs[0]['parameters']:,} parameters, {', '.join(means)}")
    for rule, others in PAIRS.items():
        for other, name in product(others, MEASURES):
            if rule in rules and other in rules:
                gaps = [found[rule, seed][name] - found[other, seed][name] for seed in range(seeds)]
                mean, half = t_interval(gaps)
                print(f"{rule} − {other}, {name}: {mean:+,.3f}" + ("" if half is None else f" ± {half:,.3f}"))


def write_rows(path: Path, found: dict[Key, dict[str, Any]], before: dict[Key, dict[str, Any]]) -> None:
    """Write a row for each run, then one for each student that was not trained."""
    rows = list(found.values())
    for key, row in before.items():
        if key not in found:
            rows.append(row)
    names = ["rule", "seed", "parameters", "steps", "perplexity_before", "kl_before", "perplexity", "kl", "tokens"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--single", action="store_true", help="also measure one size at a time, before training")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--text", type=Path, default=Path("/usr/share/doc/jargon-text/jargon.txt.gz"))
    parser.add_argument("--out", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/pruning_study.csv"))
    options = parser.parse_args()
    out, seeds, steps = options.out, options.seeds, options.steps
    teacher, data = out / "teacher", out / "data"
    write_teacher(teacher)
    write_data(options.text, data)
    rules = [*options.rules, *(SINGLE if options.single else [])]
    students = dict(write_students(rules, teacher, data, out, seeds))

    def measure(key: Key) -> dict[str, Any]:
        scores = measured(students[key], teacher, data, students[key].parent / "before")
        print(f"{key}: {scores}", flush=True)
        row = {"rule": key[0], "seed": key[1], "parameters": parameters(students[key]), "steps": 0}
        return row | {f"{name}_before": scores[name] for name in MEASURES} | {"tokens": scores["tokens"]}

    def learn(key: Key) -> dict[str, Any]:
        folder = out / f"{name_of(key[0])}_trained_{steps}_{key[1]}"
        return train(students[student_of(key)], key[1], folder, teacher, data, steps)

    def student_of(key: Key) -> Key:
        return key if key in students else (key[0], 0)

    runs = [(rule, seed) for seed, rule in product(range(seeds), options.rules) if rule not in UNTRAINED]
    with ThreadPoolExecutor(options.jobs) as pool:
        before = dict(zip(students, pool.map(measure, students), strict=True))
        scores = list(pool.map(learn, runs))
    found = {}
    for key, after in zip(runs, scores, strict=True):
        found[key] = before[student_of(key)] | {"seed": key[1], "steps": steps} | after
    write_rows(options.csv, found, before)
    report(found, seeds)


if __name__ == "__main__":
    main()
