"""What encoding costs a teacher and a student, against one call of a Transformers processor for one model.

    python benchmarks/loading.py [--rounds 9] [--output benchmarks/results/loading_cpu.csv]

Micro-batches of conversations with one decoded image of the given side, patches of 14 pixels, on one thread. The sides:

- baseline: for one model, the chat template of each conversation and one ``processor(text=…, images=…)`` for all.
- one model: ours for a student alone, with its answers marked.
- same processor: ours for a student and a teacher with the same processor.
- unlike processors: ours for two models with the same tokenizer and other normalisation.

The sides take turns; a ratio is the median over rounds of a side's time over the baseline's in the same round.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from data.collate import Collator
from data.conversation import Conversation
from vlm_distill.demo import make_tokenizer
from vlm_distill.models.pretrained_processor import PretrainedProcessor
from vlm_distill.models.shared_processing import share_processing

#: Side of an image in pixels, and samples of a micro-batch.
CASES = ((56, 16), (448, 8), (1344, 2))
PATCH = 14
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Sample = tuple[Conversation, list[Image.Image]]


def build(side: int, mean: float = 0.5) -> LlavaProcessor:
    tokenizer = make_tokenizer(["what", "colour", "is", "it", "red"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[mean] * 3
    )
    return LlavaProcessor(images, tokenizer, PATCH, "full", TEMPLATE)


def adapt(processor: LlavaProcessor) -> PretrainedProcessor:
    return PretrainedProcessor(processor, processor.tokenizer.convert_tokens_to_ids("<image>"))


def conversations(side: int, count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(count):
        pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
        question = [{"type": "image"}, {"type": "text", "text": "what colour is it " * 4}]
        answer = [{"type": "text", "text": "it is red " * 8}]
        talk = Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))
        samples.append((talk, [Image.fromarray(pixels.numpy())]))
    return samples


def encode_baseline(processor: Any, samples: Sequence[Sample]) -> None:
    texts = [processor.apply_chat_template(list(talk.messages), tokenize=False) for talk, _ in samples]
    processor(text=texts, images=[images for _, images in samples], padding=True, return_tensors="pt")


def encode_ours(collator: Collator, samples: Sequence[Sample]) -> None:
    pairs = []
    for talk, images in samples:
        pairs += collator.encode(talk, images)
    collator.batch(pairs)


def measure(side: int, count: int, rounds: int) -> list[dict[str, str | int]]:
    """Return a row for each side of a case."""
    samples, plain = conversations(side, count), build(side)
    limit = 2 * (side // PATCH) ** 2 + 1000
    student, same, other = adapt(plain), adapt(build(side)), adapt(build(side, mean=0.4))
    sides: dict[str, Callable[[], None]] = {"baseline": lambda: encode_baseline(plain, samples)}
    for name, teacher in (("one model", None), ("same processor", same), ("unlike processors", other)):
        collator = Collator(*share_processing(student, teacher), limit)
        sides[name] = lambda collator=collator: encode_ours(collator, samples)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, encode in sides.items():
            began = time.perf_counter()
            encode()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    rows: list[dict[str, str | int]] = []
    for name, seconds in times.items():
        ratios = [own / base for own, base in zip(seconds, times["baseline"], strict=True)]
        rows.append(
            {
                "side": side,
                "image_tokens": (side // PATCH) ** 2,
                "batch": count,
                "encoding": name,
                "ms_per_sample": f"{1000 * statistics.median(seconds) / count:.2f}",
                "ratio": f"{statistics.median(ratios):.2f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for side, count in CASES:
        rows += measure(side, count, options.rounds)
    with options.output.open("w", newline="") if options.output else sys.stdout as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
