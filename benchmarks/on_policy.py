"""The share of a run's time that drawing answers takes: models with random weights, questions of random words.

    python benchmarks/on_policy.py [--width 128] [--layers 2] [--length 24] [--steps 6]

Prints, for answers drawn 16 at once and one by one, the share of an on-policy step that goes
into answers (``on_policy/time``), the length of these, and how many times longer such a step takes than one from data.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from vlm_distill import models
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

WORDS = [f"w{i}" for i in range(500)]


def decoder(width: int, layers: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    return {"config": {"model_type": "llama", "max_position_embeddings": 1024, **shape, **heads}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 128), ("layers", 2), ("length", 24), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, chance = Path(temporary), random.Random(0)

        def text() -> str:
            return " ".join(chance.choices(WORDS, k=options.length))

        roles = ("user", "assistant")
        rows = [{"messages": [{"role": role, "content": text()} for role in roles]} for _ in range(64)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        teacher = {"decoder": decoder(2 * options.width, 2 * options.layers)}
        models.build_vlm(teacher, tokenizer=make_tokenizer(WORDS)).save_pretrained(folder / "teacher")
        processes = Processes()
        for batch in (16, 1):
            lines = run(folder, options, batch, processes)
            on = [line for line in lines if line["on_policy/step"]]
            spent = {kind: _median(lines, kind) for kind in (0.0, 1.0)}
            print(
                f"{batch:2} answers at once: {statistics.median(line['on_policy/time'] for line in on):.0%} of a step, "
                f"{statistics.mean(line['on_policy/length'] for line in on):.0f} tokens an answer; "
                f"{spent[1.0] / spent[0.0]:.1f} times as long as a step from data ({spent[0.0]:.2f} s)"
            )
        processes.close()


def run(folder: Path, options: argparse.Namespace, batch: int, processes: Processes) -> list[dict[str, Any]]:
    """Return the metrics of a run's training steps."""
    out = folder / f"run{batch}"
    plain = {
        "student": {"decoder": decoder(options.width, options.layers), "tokenizer": str(folder / "teacher")},
        "teacher": {"path": str(folder / "teacher")},
        "loss": [{"name": "jsd"}],
        "data": {"train": [{"path": str(folder / "data.jsonl")}], "workers": 0},
        "training": {"steps": 2 * options.steps, "batch_size": 16},
        "deepspeed": {"stage": 0},
        "on_policy": {"fraction": 0.5, "max_new_tokens": options.length, "batch_size": batch},
        "output": str(out),
    }
    Trainer(RunConfig.model_validate(plain), processes).run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    for before, line in zip([{"seconds": 0.0}, *trained], trained, strict=False):
        line["spent"] = line["seconds"] - before["seconds"]
    return trained[1:]  # the first warms up


def _median(lines: list[dict[str, Any]], kind: float) -> float:
    return statistics.median(line["spent"] for line in lines if line["on_policy/step"] == kind)


if __name__ == "__main__":
    main()
