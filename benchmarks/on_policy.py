"""Drawn tokens a second of whole on-policy steps, ours against TRL's ``DistillationTrainer``.

    python benchmarks/on_policy.py [--widths 256-512] [--vocabulary 32000] [--micro 8] [--new-tokens 32 64]
                                   [--rounds 3] [--steps 4] [--output FILE.csv]

The same small LLaVA of random weights (``benchmarks/training.py``) answers the same questions with images, and learns
by the Jensen-Shannon divergence from the same teacher on what it drew, at temperature 1. A step reads a micro-batch of
questions, draws, and updates by AdamW without decay. End tokens are so unlikely that nearly all answers have the full
length. One of our sides draws one answer at a time (``on_policy.batch_size: 1``).

The sides take turns in one process of one thread; a step's time is the processor's, from the end of the step before to
its own end. A ratio is the median over rounds of one side's tokens a second over TRL's in the same round. ``drawing``
is the share of a step that our side spends on getting answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

sys.path.append(str(Path(__file__).parent))
from losses import processor  # benchmarks/losses.py
from training import SIZES, TINY_LR, add_rows, write_data, write_model  # benchmarks/training.py


class Round(NamedTuple):
    """Some steps of a side: their seconds, tokens drawn, and (ours) the mean share of a step spent on answers."""

    seconds: float
    tokens: float
    drawing: float | None = None


class Side(NamedTuple):
    """What is timed; the first step of a round is not."""

    name: str
    round: Callable[[], Round]


OURS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"data": {"packing": True}},
    "padded, one answer at a time": {"on_policy": {"batch_size": 1}},
}


def ours(name: str, folder: Path, data: Path, processes: Processes, options: argparse.Namespace, length: int) -> Side:
    plain: dict[str, Any] = {
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "loss": [{"name": "jsd"}],
        "data": {"train": [{"path": str(data)}], "workers": 0, "max_length": 1024},
        "optimizer": {"lr": TINY_LR, "weight_decay": 0.0, "schedule": "constant", "max_grad_norm": 1.0},
        "training": {"steps": 1_000_000, "batch_size": options.micro, "device": "cpu"},
        "on_policy": {"fraction": 1.0, "max_new_tokens": length},
        "deepspeed": {"stage": 0},
        "output": str(folder / "runs" / f"{name} {length}".replace(" ", "_")),
    }
    for section, changes in OURS[name].items():
        plain[section] |= changes
    trainer = Trainer(RunConfig.model_validate(plain), processes)
    trainer.engine.train()
    done = 0

    def round() -> Round:
        nonlocal done
        ends, tokens, drawing = [], 0.0, []
        for step in trainer.batches(done, done + options.steps + 1):
            metrics, _ = trainer.train_step(step, 0.0)
            ends.append(time.process_time())
            if len(ends) > 1:
                tokens += metrics["on_policy/tokens"]
                drawing.append(metrics["on_policy/time"])
        done += len(ends)
        return Round(ends[-1] - ends[0], tokens, statistics.mean(drawing))

    return Side(name, round)


def theirs(folder: Path, data: Path, options: argparse.Namespace, length: int) -> Side:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageColumn
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    turn = [{"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}]
    asked = []
    for row in rows:
        asked.append({"images": [str(data.parent / name) for name in row["images"]], "prompt": row["messages"][:1]})
    table = Dataset.from_list(asked, features=Features({"images": List(ImageColumn()), "prompt": turn}))
    ends: list[float] = []
    tokens: list[float] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            ends.append(time.process_time())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "completions/mean_length" in logs:
                tokens.append(logs["completions/mean_length"] * options.micro)

    settings = DistillationConfig(
        output_dir=str(folder / "trl"),
        beta=0.5,
        temperature=1.0,
        max_completion_length=length,
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=1,
        max_steps=options.steps + 1,
        learning_rate=TINY_LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(folder / role, dtype=torch.float32, trust_remote_code=False)
        for role in ("student", "teacher")
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=table,
        processing_class=AutoProcessor.from_pretrained(
            folder / "student", padding_side="left", trust_remote_code=False
        ),
        callbacks=[Keep()],
    )

    def round() -> Round:
        ends.clear()
        tokens.clear()
        trainer.train()
        return Round(ends[-1] - ends[0], sum(tokens[1:]))

    return Side("TRL DistillationTrainer", round)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="256-512", choices=SIZES)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--micro", type=int, default=8, help="samples of a step")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--sides", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for role, size in zip(("student", "teacher"), SIZES[options.widths], strict=True):
            write_model(folder / role, size, role == "teacher", options.vocabulary)
        data = write_data(folder / "data", 64, options.vocabulary)
        # TRL's trainers first: inside our process group accelerate would wrap their models in DDP.
        everyone = {length: [theirs(folder, data, options, length)] for length in options.new_tokens}
        processes = Processes("cpu")
        torch.set_num_threads(1)
        for length, sides in everyone.items():
            sides += [ours(side, folder, data, processes, options, length) for side in options.sides]
            rows = measure(sides, options, length)
            if options.output:
                add_rows(options.output, rows)
        processes.close()


def measure(sides: list[Side], options: argparse.Namespace, length: int) -> list[dict[str, object]]:
    """Return a row of the table for each side."""
    found: dict[str, list[Round]] = {side.name: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            found[side.name].append(side.round())
    rows: list[dict[str, object]] = []
    speeds = {name: [part.tokens / part.seconds for part in rounds] for name, rounds in found.items()}
    for name, rounds in found.items():
        ratios = [a / b for a, b in zip(speeds[name], speeds[sides[0].name], strict=True)]
        shares = [part.drawing for part in rounds if part.drawing is not None]
        row = {
            "side": name,
            "new_tokens": length,
            "drawn_tokens_per_second": round(statistics.median(speeds[name]), 1),
            "over_trl": round(statistics.median(ratios), 2),
            "over_trl_lowest": round(min(ratios), 2),
            "drawing": round(statistics.median(shares), 2) if shares else "",
            "widths": options.widths,
            "vocabulary": options.vocabulary,
            "samples_a_step": options.micro,
            "device": f"{processor()}, 1 thread(s)",
        }
        print(row, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
