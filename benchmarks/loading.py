"""What encoding costs a teacher and a student, against one call of a Transformers processor for one model.

    python benchmarks/loading.py [--rounds 9] [--output benchmarks/results/loading_cpu.csv]

Micro-batches of conversations with one decoded image of the given side, patches of 14 pixels, on one thread. The sides:

- baseline: for one model, the chat template of each conversation and one ``processor(text=…, images=…)`` for all.
- one model: a step of ours for a student alone, with its answers marked.
- same processor: a step for a student and a teacher with the same processor.
- other normalisation: a step for two models with the same tokenizer and template, and image processors that differ.
- other template: a step for two models with the same image processor, and chat templates that differ.

The sides take turns; a ratio is the median over rounds of a side's time over the baseline's in the same round.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from data.collate import Collator
from data.conversation import Conversation
from data.loader import StepDataset, StepSplit
from data.mixture import Mixture
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


class Samples(list[Conversation]):
    """A source in memory."""

    name = "samples"

    def size(self, index: int) -> int:
        return 1


def build(side: int, mean: float = 0.5, template: str = TEMPLATE) -> LlavaProcessor:
    tokenizer = make_tokenizer(["what", "colour", "is", "it", "red"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=[mean] * 3
    )
    return LlavaProcessor(images, tokenizer, PATCH, "full", template)


def adapt(processor: LlavaProcessor) -> PretrainedProcessor:
    return PretrainedProcessor(processor, processor.tokenizer.convert_tokens_to_ids("<image>"))


def conversations(side: int, count: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    samples = Samples()
    for _ in range(count):
        pixels = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
        question = [{"type": "image"}, {"type": "text", "text": "what colour is it " * 4}]
        answer = [{"type": "text", "text": "it is red " * 8}]
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        samples.append(Conversation(messages, (Image.fromarray(pixels.numpy()),)))
    return samples


def encode_baseline(processor: Any, samples: Samples) -> None:
    texts = [processor.apply_chat_template(list(talk.messages), tokenize=False) for talk in samples]
    processor(text=texts, images=[list(talk.images) for talk in samples], padding=True, return_tensors="pt")


def step_of(collator: Collator, samples: Samples) -> Callable[[], None]:
    """Return what makes a training's step of all samples."""
    mixture, split = Mixture([samples], batch_size=len(samples)), StepSplit(len(samples))
    dataset = StepDataset(mixture, collator, split, load=lambda image: image, on_bad="fail")
    return lambda: dataset[0]


def measure(side: int, count: int, rounds: int) -> list[dict[str, str | int]]:
    """Return a row for each side of a case."""
    samples, plain = conversations(side, count), build(side)
    limit = 2 * (side // PATCH) ** 2 + 1000
    student = adapt(plain)
    teachers = {
        "one model": None,
        "same processor": adapt(build(side)),
        "other normalisation": adapt(build(side, mean=0.4)),
        "other template": adapt(build(side, template=TEMPLATE.replace("<assistant>", "<answer>"))),
    }
    sides: dict[str, Callable[[], None]] = {"baseline": lambda: encode_baseline(plain, samples)}
    for name, teacher in teachers.items():
        sides[name] = step_of(Collator(*share_processing(student, teacher), limit), samples)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, encode in sides.items():
            began = time.process_time()
            encode()
            if number:  # the first round warms up
                times[name].append(time.process_time() - began)
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
