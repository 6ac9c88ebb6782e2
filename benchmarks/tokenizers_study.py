"""Losses for a teacher with another tokenizer, each alone and with cross-entropy, for docs/tokenizers.md.

    python benchmarks/tokenizers_study.py [--steps 200] [--seeds 5] [--jobs 2]

The demo's teacher (configs/demo) writes whole words; its student here writes pieces of words, in a byte-level tokenizer
that is trained on the training questions. The teacher runs once, into a cache of hidden states. Runs of one seed have
the same first weights and the same samples, ROWS questions with their answers, which every loss reads. Writes each
run's accuracy on QUESTIONS test questions to benchmarks/results/tokenizers_study.csv. Complete runs in --out are not
run again. Prints, for each loss, means and standard deviations over seeds, and by how much it exceeds cross-entropy
alone, paired by seed, with the 95 % t-interval.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_distill.demo import prepare
from vlm_distill.evaluation.seed_statistics import t_interval

CONFIG, TEACHER = Path("configs/demo/taid.yaml"), Path("configs/demo/teacher")
ROWS, QUESTIONS = 4000, 2000
VOCABULARY = 330
ALONE = {
    "alm": "{name: alm, weight: 100}",
    "overlap_kl": "{name: overlap_kl}",
    "uld": "{name: uld}",
    "gold": "{name: overlap_kl, divergence: jsd, weight: 0.7}, {name: uld, tokens: unshared, weight: 0.3}",
}
LABELS = "{name: cross_entropy}"
LOSSES = {
    "cross_entropy": LABELS,
    **ALONE,
    **{f"{name} + cross_entropy": f"{terms}, {LABELS}" for name, terms in ALONE.items()},
}


def write_tokenizer(data: Path) -> Path:
    """Write the student's tokenizer, pieces of the training questions' words; return its folder."""
    folder = data / "pieces"
    if folder.exists():
        return folder
    teacher = AutoTokenizer.from_pretrained(TEACHER, trust_remote_code=False)
    special = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(data), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens={"user_token": "<user>", "assistant_token": "<assistant>"},
        chat_template=teacher.chat_template,
    )
    fast.save_pretrained(folder)
    return folder


def texts(data: Path) -> list[str]:
    """Return the texts of the questions and answers that are trained on."""
    found = []
    for line in (data / "train.jsonl").read_text().splitlines()[:ROWS]:
        question, answer = json.loads(line)["conversations"]
        found += [question["value"].removeprefix("<image>"), answer["value"]]
    return found


def run(module: str, name: str, data: Path, overrides: Sequence[str]) -> None:
    """Run a module with the settings that all runs share and those given; end with its error."""
    shared = [
        f"student.tokenizer={data / 'pieces'}",
        f"loss=[{LOSSES[name]}]",
        "teacher=null" if name == "cross_entropy" else f"teacher.cache={{folder: {data / 'teacher'}}}",
        f"data.train=[{{path: {data / 'train.jsonl'}, limit: {ROWS}}}]",
        f"data.eval=[{{path: {data / 'test.jsonl'}, limit: {QUESTIONS}}}]",
        "data.workers=1",
        "training.batch_size=32",
        "training.keep_checkpoints=1",
        "evaluation.every=null",
        "evaluation.max_new_tokens=12",
        "evaluation.teacher=false",
    ]
    command = [sys.executable, "-m", f"vlm_distill.{module}", str(CONFIG), *shared, *overrides]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module} {name}: {done.stderr[-2000:]}")


def train(name: str, seed: int, out: Path, data: Path, steps: int) -> dict[str, object]:
    """Train, unless ``out`` has the run already; return its row of the table."""
    folder = out / f"{name.replace(' + ', '_and_')}_{steps}_{seed}"
    if not (folder / "summary.json").exists():
        run("train", name, data, [f"training.steps={steps}", f"training.seed={seed}", f"output={folder}"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if line["kind"] == "train")
    accuracy = next(line["exact"] for line in reversed(lines) if line["kind"] != "train")
    row = {
        "loss": name,
        "seed": seed,
        "steps": steps,
        "seconds": round(last["seconds"], 1),
        "compared": round(last["overlap_kl/compared"], 3) if "overlap_kl/compared" in last else None,
        "accuracy": round(accuracy, 4),
    }
    print(f"{folder.name}: {row['accuracy']} after {row['seconds']} s", flush=True)
    return row


def report(rows: Sequence[dict[str, object]]) -> None:
    """Print a line for each loss."""
    scores: dict[str, list[float]] = {name: [] for name in LOSSES}
    for row in rows:
        scores[str(row["loss"])].append(100 * float(str(row["accuracy"])))
    for name, values in scores.items():
        told = f"{name:28} {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %"
        if name != "cross_entropy":
            gains = [ours - plain for ours, plain in zip(values, scores["cross_entropy"], strict=True)]
            mean, half = t_interval(gains)
            told += f"   against cross-entropy alone: {mean:+.1f} ± {half:.1f} points"
        print(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/tokenizers_study.csv"))
    options = parser.parse_args()
    data = prepare(options.out / "data")
    write_tokenizer(data)
    run("cache", "alm", data, [])
    # Seed by seed, so that a study that is broken off has whole seeds.
    runs = list(product(range(options.seeds), LOSSES))
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(train, name, seed, options.out, data, options.steps) for seed, name in runs]
        rows = [future.result() for future in waiting]
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    report(rows)


if __name__ == "__main__":
    main()
