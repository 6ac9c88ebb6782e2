"""What packing saves on the CPU: student tokens a second of a distillation step's two models, by how rows are filled.

    python benchmarks/packing.py [--output benchmarks/results/packing_cpu.csv]

Untrained assembled models, the teacher's forward and the student's forward and backward, without losses and optimizer.
Each conversation has one image of 64 tokens and an answer whose length is drawn from a log-normal; micro-batches of 8.
The ways take turns, and the best of their rounds counts.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from data.batch import DistillationBatch
from data.collate import collate
from data.conversation import Conversation
from data.encoding import Pair, encode_pair
from vlm_distill import models
from vlm_distill.demo import make_tokenizer
from vlm_distill.models.interface import VisionLanguageModel

SAMPLES, MICRO = 32, 8
WORDS = ["what", "is", "it", "red"]


def build(width: int, layers: int) -> VisionLanguageModel:
    vision = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    text = {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "max_position_embeddings": 4096}
    return models.build_vlm(
        {
            "vision_encoder": {"source": "timm", "name": "vit_tiny_patch16_224", "config": vision, "image_size": 64},
            "decoder": {"config": text | heads},
        },
        tokenizer=make_tokenizer(WORDS),
    )


def pair(student: VisionLanguageModel, teacher: VisionLanguageModel, words: int) -> Pair:
    question = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    answer = [{"type": "text", "text": " ".join(["red"] * words)}]
    talk = Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
    return encode_pair(talk, [Image.new("RGB", (64, 64), "red")], student.processor, teacher.processor, 2048)


def step(student: VisionLanguageModel, teacher: VisionLanguageModel, batch: DistillationBatch) -> None:
    assert batch.teacher is not None
    with torch.no_grad():
        teacher(batch.teacher.inputs, batch.teacher.positions)
    student(batch.student.inputs, batch.student.positions).hidden.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = build(128, 3), build(256, 4)
    draw = random.Random(0)
    pairs = [pair(student, teacher, min(900, 1 + int(draw.lognormvariate(4.2, 1.2)))) for _ in range(SAMPLES)]
    lengths = sorted(len(p.student.input_ids) for p in pairs)
    quarters = [lengths[min(SAMPLES - 1, SAMPLES * k // 4)] for k in range(5)]
    print(f"lengths of the student's samples: quartiles {quarters}, mean {sum(lengths) / SAMPLES:.0f}", file=sys.stderr)

    def batches(samples: list[Pair], packs: bool, one_row: bool = False) -> list[DistillationBatch]:
        made = []
        for model in (student, teacher):
            model.processor.one_row = one_row
        for start in range(0, SAMPLES, MICRO):
            chosen = samples[start : start + MICRO]
            made.append(collate(chosen, student.processor, teacher.processor, packed=(packs, packs)))
        return made

    by_length = sorted(pairs, key=lambda p: len(p.student.input_ids))
    ways = {
        "padded": batches(pairs, False),
        "grouped by length": batches(by_length, False),
        "packed": batches(pairs, True),
        "packed in one row": batches(pairs, True, one_row=True),
        "grouped and packed": batches(by_length, True),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(options.rounds):
        for name, made in ways.items():
            began = time.perf_counter()
            for batch in made:
                step(student, teacher, batch)
            best[name] = min(best[name], time.perf_counter() - began)
    rows = []
    for name, made in ways.items():
        tokens = sum(batch.student.tokens for batch in made)
        places = sum(batch.student.inputs["input_ids"].numel() for batch in made)
        rows.append(
            {
                "rows": name,
                "padding": f"{1 - tokens / places:.3f}",
                "tokens_per_second": f"{tokens / best[name]:.0f}",
                "ratio": f"{best['padded'] / best[name]:.2f}",
            }
        )
    with options.output.open("w", newline="") if options.output else sys.stdout as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
