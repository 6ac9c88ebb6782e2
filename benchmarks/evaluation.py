"""Answering a data set in batches, images decoded ahead, against one question at a time: time, on the same model.

    python benchmarks/evaluation.py [--model configs/demo/teacher] [--questions 512] [--batch-size 64] [--repeats 3]

The loop is an evaluation without batches: decode a question's images, ask, go on. Both sides use the
KV cache, are greedy, run in one process and take turns on easy-VQA's test questions; their answers must agree. Times
are medians, and on a busy machine only the ratio means anything. Writes benchmarks/results/evaluation_cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

from data.images import load_image
from data.opening import open_source
from vlm_distill.demo import prepare
from vlm_distill.evaluation.answering import Asking, evaluate
from vlm_distill.evaluation.question_source import evenly_spaced
from vlm_distill.models import load_vlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/demo/teacher")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/evaluation_cpu.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_vlm(options.model, dtype="float32").eval()
    source = open_source(str(prepare(options.out / "data") / "test.jsonl"))
    rows = evenly_spaced(len(source), options.questions)

    def one_at_a_time() -> list[str]:
        answers = []
        for row in rows:
            prompt = source[row].prompt()
            images = [load_image(image) for image in prompt.images]
            answers.append(model.generate([(prompt, images)], max_new_tokens=options.max_new_tokens)[0].text)
        return answers

    def batched() -> list[str]:
        asking = Asking(options.batch_size, options.max_new_tokens, options.questions)
        return [p.answer for p in evaluate(model, source, asking)]

    if batched() != one_at_a_time():  # also the warm-up
        raise SystemExit("the two sides' answers differ")
    times: dict[str, list[float]] = {"one_at_a_time": [], "batched": []}
    for _ in range(options.repeats):
        for name, run in (("one_at_a_time", one_at_a_time), ("batched", batched)):
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    loop, fast = (statistics.median(times[name]) for name in times)
    result = {
        "model": options.model,
        "questions": len(rows),
        "batch_size": options.batch_size,
        "one_at_a_time_s": round(loop, 2),
        "batched_s": round(fast, 2),
        "ratio": round(loop / fast, 2),
        "repeats": options.repeats,
        "threads": options.threads,
        "torch": torch.__version__,
    }
    print(
        f"{len(rows)} questions: one at a time {loop:.1f} s, in batches of {options.batch_size} {fast:.1f} s, "
        f"{loop / fast:.1f} times faster"
    )
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, result)
        writer.writeheader()
        writer.writerow(result)


if __name__ == "__main__":
    main()
