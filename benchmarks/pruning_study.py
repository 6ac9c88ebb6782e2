"""SmolLM2-135M pruned to half of its size by several rules, before and after a short distillation, for docs/pruning.md.

    OMP_NUM_THREADS=1 PYTHONPATH=runs/smollm2/packages:. python benchmarks/pruning_study.py [--steps 16] [--seeds 3]

Teacher, text and what must be installed: benchmarks/smollm2_study.py. Students keep 11 of 30 layers, chosen by RULES,
or all layers with two thirds of the width, the heads and the neurons. `influence` and `activation` are measured on
the first training samples of a run with seed 0; random choices have the seed of their run. Training is that of
configs/language/smollm2_every_third.yaml with forward KL. Runs of one seed read the same rows in the same order, so
that the other rules' runs differ by that order alone. benchmarks/results/pruning_study.csv gets a row for each run;
complete runs in --out are not run again. Prints means over seeds, and differences paired by seed with 95 %
t-intervals.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import statistics
import sys
from collections.abc import Container, Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from smollm2_study import CONFIG, MEASURES, measured, write_data, write_teacher

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
#: One size at a time, measured before training alone, with one draw.
SINGLE: dict[str, dict[str, Any]] = {}
for size, kept in WIDTHS.items():
    # With all nine heads, Llama's width is a multiple of nine.
    SINGLE[f"activation, {size}"] = SINGLE[f"random {size}"] = {size: 387 if size == "width" else kept}
#: Rules that are compared with others: the measured ones with those that look at nothing.
PAIRS = {"influence": ("spaced", "first", "random layers"), "activation": ("random sizes",)}


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


def write_students(teacher: Path, data: Path, out: Path, seeds: int) -> Iterator[tuple[str, int, Path]]:
    """Prune the teacher by every rule; yield rule, seed and folder. Rules that are not random have one student."""
    from vlm_distill.config.file import load_config
    from vlm_distill.models.plain_layers import find_stack
    from vlm_distill.models.pruning import pruned
    from vlm_distill.run import Run
    from vlm_distill.runtime.processes import Processes

    processes = Processes("cpu")
    for rule, section in (RULES | SINGLE).items():
        for seed in range(seeds if rule.startswith("random") and rule in RULES else 1):
            folder = out / f"{name_of(rule)}_{seed}"
            yield rule, seed, folder / "student"
            if (folder / "student" / "config.json").exists():
                continue
            overrides = [f"teacher.path={teacher}", f"data.train.0.path={data / 'train.jsonl'}", f"output={folder}"]
            overrides.append(f"student.from_teacher={json.dumps(section)}")
            parts = Run(load_config(CONFIG, overrides), processes)
            if not rule.startswith("random"):
                student = parts.student
            else:
                assert parts.teacher is not None
                assert parts.teacher.model is not None
                whole = parts.teacher.model
                student = pruned(whole, {"decoder": random_choice(section, find_stack(whole, "decoder"), seed)})
            student.save_pretrained(folder / "student")
    processes.close()


def train(student: Path, seed: int, folder: Path, teacher: Path, data: Path, steps: int) -> dict[str, Any]:
    """Train, unless ``folder`` has the run already; return its final scores."""
    if not (folder / "summary.json").exists():
        from vlm_distill.train import main as train_here

        arguments = [
            CONFIG,
            f"student.path={student}",
            "loss=[{name: forward_kl}]",
            f"teacher.path={teacher}",
            f"data.train.0.path={data / 'train.jsonl'}",
            f"data.eval.0.path={data / 'held_out.jsonl'}",
            f"training.steps={steps}",
            f"training.seed={seed}",
            f"output={folder}",
        ]
        if train_here(arguments):
            sys.exit(f"{folder}: the run failed")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["kind"] != "train"][-1]
    return {name: scores[name] for name in (*MEASURES, "tokens")}


def parameters(folder: Path) -> int:
    """Return the number of a student's parameters."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def report(found: dict[tuple[str, int], dict[str, Any]], seeds: int) -> None:
    """Print means over seeds, and paired differences."""
    for rule in RULES:
        runs = [found[rule, seed] for seed in range(seeds)]
        means = []
        for name in ("perplexity_before", "kl_before", "perplexity", "kl"):
            values = [one[name] for one in runs]
            means.append(f"{name} {statistics.mean(values):,.3f} ± {statistics.stdev(values):,.3f}")
        print(f"{rule:14} {runs[0]['parameters']:,} parameters, {', '.join(means)}")
    for rule, others in PAIRS.items():
        for other, name in product(others, MEASURES):
            gaps = [found[rule, seed][name] - found[other, seed][name] for seed in range(seeds)]
            mean, half = t_interval(gaps)
            print(f"{rule} − {other}, {name}: {mean:+,.3f}" + ("" if half is None else f" ± {half:,.3f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=Path("/usr/share/doc/jargon-text/jargon.txt.gz"))
    parser.add_argument("--out", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/pruning_study.csv"))
    options = parser.parse_args()
    out, seeds = options.out, options.seeds
    teacher, data = out / "teacher", out / "data"
    write_teacher(teacher)
    write_data(options.text, data)

    students = {}
    for rule, seed, folder in write_students(teacher, data, out, seeds):
        students[rule, seed] = folder
    before, found = {}, {}

    def measure(rules: Container[str]) -> None:
        for key, folder in students.items():
            if key[0] in rules:
                before[key] = measured(folder, teacher, data, folder.parent / "before")
                print(key, before[key], flush=True)

    measure(RULES)
    for seed, rule in product(range(seeds), RULES):
        own = (rule, seed) if (rule, seed) in students else (rule, 0)
        folder = out / f"{name_of(rule)}_trained_{options.steps}_{seed}"
        scores = train(students[own], seed, folder, teacher, data, options.steps)
        earlier = {f"{name}_before": before[own][name] for name in MEASURES}
        size = parameters(students[own])
        found[rule, seed] = {
            "rule": rule,
            "seed": seed,
            "parameters": size,
            "steps": options.steps,
            **earlier,
            **scores,
        }
        print(found[rule, seed], flush=True)
    measure(SINGLE)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found["first", 0]))
        writer.writeheader()
        writer.writerows(found[rule, seed] for rule, seed in product(RULES, range(seeds)))
        for rule in SINGLE:
            known = {"rule": rule, "seed": 0, "parameters": parameters(students[rule, 0]), "steps": 0}
            writer.writerow(known | {f"{name}_before": before[rule, 0][name] for name in MEASURES})
    report(found, seeds)


if __name__ == "__main__":
    main()
