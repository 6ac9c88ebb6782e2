"""What a step costs with a cached teacher and with the teacher itself, and what 16-bit log-probabilities lose.

    OMP_NUM_THREADS=1 python benchmarks/cached_teacher.py [--steps 20] [--batch 32]

For docs/teachers.md. The demo's student and teacher (configs/demo/taid.yaml) on one rank of one thread: steps of all
runs in turn, in one process, as CPU seconds of that process, so that others on the machine hardly matter. Two
have a frozen vision encoder beside the cached teacher, whose features are made in each step or cached. The same two of
a family of Transformers' own with random weights (LLaVA, shapes in ``write_family``), projector frozen. Then, on
random distributions over 32,768 tokens, KL(p‖q) from the 64 likeliest tokens and the tail, with log-probabilities in 16
and in 32 bits, beside the whole KL. Writes benchmarks/results/cached_teacher.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_distill import losses
from vlm_distill.caching.fill import fill
from vlm_distill.config.file import load_config
from vlm_distill.demo import prepare
from vlm_distill.losses import TopKTargets
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "cached_teacher.csv"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
# The teacher's cache and further settings of each run; CACHE is replaced by a folder.
FROZEN = "student.train=[projector, decoder]"
WAYS: dict[str, tuple[list[str], list[str]]] = {
    "live": ([], []),
    "hidden": (["form: hidden"], []),
    "topk": (["form: topk", "k: 8"], []),
    "hidden, frozen encoder": (["form: hidden"], [FROZEN]),
    "hidden, cached features": (["form: hidden"], [FROZEN, "student.vision_cache=CACHE/features"]),
    "family, live features": (["form: hidden"], []),
    "family, cached features": (["form: hidden"], ["student.vision_cache=CACHE/features"]),
}


def write_family(folder: Path, tokenizer: Path, layers: int) -> Path:
    """LLaVA: CLIP of width 128 with 6 layers on 112 pixels (64 tokens), a Llama of width 128 with ``layers`` layers."""
    torch.manual_seed(layers)
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer, trust_remote_code=False)
    words.add_tokens(["<image>"], special_tokens=True)
    words.image_token = "<image>"
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, num_hidden_layers=6, image_size=112, patch_size=14),
        text_config=LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=len(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": 112, "width": 112}
    images = CLIPImageProcessor(size={"shortest_edge": 112}, crop_size=side)
    LlavaProcessor(images, words, 14, "default", TEMPLATE, num_additional_image_tokens=1).save_pretrained(folder)
    return folder


def times(folder: Path, steps: int, batch: int) -> dict[str, list[tuple[float, float]]]:
    """Return the CPU seconds of making a step's batches and of learning from them, for each run."""
    data = prepare(folder / "data")
    student, teacher = (write_family(folder / f"llava{n}", data / "tokenizer", n) for n in (4, 8))
    processes = Processes("cpu")
    trainers: dict[str, Any] = {}
    for way, (cache, more) in WAYS.items():
        own = folder / way.replace(",", "").replace(" ", "_")
        overrides = [
            f"data.train=[{{path: {data / 'unlabelled.jsonl'}, labelled: false, limit: {steps * batch}}}]",
            "data.eval=[]",
            "data.workers=0",
            "deepspeed.stage=0",
            f"training.batch_size={batch}",
            f"training.steps={steps}",
            f"output={own / 'run'}",
            *(word.replace("CACHE", str(own)) for word in more),
        ]
        if way.startswith("family"):
            overrides += [f"student.{part}=null" for part in ("tokenizer", "vision_encoder", "projector", "decoder")]
            overrides += [f"student.path={student}", "student.train=[decoder]", f"teacher.path={teacher}"]
        if cache:
            place = f"folder: {own / 'cache'}"
            overrides.append(f"teacher.cache={{{', '.join([place, *cache])}}}")
        config = load_config("configs/demo/taid.yaml", overrides)
        if cache:
            fill(config, processes)
        trainers[way] = Trainer(config, processes)
        trainers[way].engine.train()
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(steps):
        for way, trainer in trainers.items():
            began = time.process_time()
            step = trainer.dataset[number]
            made = time.process_time()
            trainer.train_step(step, 0.0)
            found[way].append((made - began, time.process_time() - made))
    processes.close()
    return found


def precision(sharpness: float, rows: int = 128, vocabulary: int = 32_768, k: int = 64) -> dict[str, float]:
    """Return means of KL(p‖q) in nats: whole, from top-k in 32 bits, and the error that 16 bits add to that."""
    generator = torch.Generator().manual_seed(0)
    p = sharpness * torch.randn(rows, vocabulary, generator=generator)
    q = p + torch.randn(rows, vocabulary, generator=generator)
    loss = losses.build("forward_kl")
    exact = TopKTargets.of(p, k)
    rounded = torch.cat([exact.logprobs.half().float(), exact.tail.unsqueeze(-1)], -1).log_softmax(-1)
    found = []
    for log_p in (torch.cat([exact.logprobs, exact.tail.unsqueeze(-1)], -1), rounded):
        found.append(losses.topk.topk_loss_and_grad(loss, q.clone(), exact.ids, log_p, grad=False).loss)
    whole = loss(q, p)
    return {
        "kl": whole.mean().item(),
        "kl_top64": found[0].mean().item(),
        "error_of_16_bits": (found[1] - found[0]).abs().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        found = times(Path(folder), given.steps, given.batch)
    live = [statistics.median(column) for column in zip(*found["live"][2:], strict=True)]
    for way, measured in found.items():
        data, learn = (statistics.median(column) for column in zip(*measured[2:], strict=True))
        # A family's ratios are to its own live features, not to the demo's.
        if way == "family, live features":
            live = [data, learn]
        rows += [
            {"what": f"{way}: making a batch, CPU s", "value": data, "ratio": live[0] / data},
            {"what": f"{way}: learning from it, CPU s", "value": learn, "ratio": live[1] / learn},
        ]
    for sharpness in (2.0, 4.0, 8.0):
        rows += [{"what": f"sharpness {sharpness:g}: {k}, nats", "value": v} for k, v in precision(sharpness).items()]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["what", "value", "ratio"])
        writer.writeheader()
        for row in rows:
            row["value"] = f"{row['value']:.4g}"
            row["ratio"] = f"{row['ratio']:.2f}" if "ratio" in row else ""
            writer.writerow(row)
            print(row["what"], row["value"], row["ratio"])


if __name__ == "__main__":
    main()
