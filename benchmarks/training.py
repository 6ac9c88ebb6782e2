"""Supervised tokens a second and peak memory of an epoch: ours padded, grouped, packed and cached, against TRL.

    python benchmarks/training.py [--widths 512-768] [--vocabulary 152000] [--micro 4] [--sides padded packed]
                                  [--threads 1] [--rounds 3] [--samples 96] [--output FILE.csv]
    python benchmarks/training.py --device cuda      larger models in bfloat16; benchmarks/gpu.sh runs it

The same small LLaVA learns from the same teacher by forward KL on the same samples, by AdamW without decay: on TRL's
side in its off-policy trainer ``GOLDTrainer`` (``lmbda=0``, ``beta=0``, temperature 1), which forms whole logits at
every position. The learning rate is so small that all must report the same loss: ours is the mean over an epoch's
tokens, TRL's the mean of its steps' means, which differs by a few thousandths. TRL's trainer is built before our
process group exists: inside one, accelerate would wrap its model in DDP.

``--widths`` are the student's and the teacher's. An image is 16 tokens (of 56² pixels). Questions have a log-normal
number of words of median 60, answers of median 30, at most 384 and 192; the table names the quartiles of what results.
The sides take turns epoch by epoch in one process, which reads the data itself. A ratio is the median over rounds of
one side's tokens a second over TRL's in the same round. With one thread on a CPU a side's time is the processor's,
which others on the machine hardly change; otherwise it is the clock's.

Peak memory is above weights, gradients and the optimizer's state: on a CPU what torch's allocator held in an epoch of
its own under the profiler, on a GPU ``max_memory_allocated``. Caches are filled before, as ``vlm-distill cache`` does.
``--output`` adds rows to a table that exists.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_distill.caching.fill import fill
from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer

sys.path.append(str(Path(__file__).parent))
from losses import peak_bytes, processor  # benchmarks/losses.py

TINY_LR = 1e-12
SPECIAL = ["<pad>", "</s>", "<unk>", "<image>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


class Size(NamedTuple):
    """Of a model: width, layers and heads of its decoder, and of its vision tower."""

    width: int
    layers: int
    heads: int
    tower: int
    tower_layers: int


#: Student and teacher, by their widths.
SIZES = {
    "256-512": (Size(256, 4, 4, 128, 2), Size(512, 5, 8, 192, 3)),
    "512-768": (Size(512, 5, 8, 192, 3), Size(768, 8, 12, 192, 3)),
    "768-1024": (Size(768, 8, 12, 192, 3), Size(1024, 12, 16, 192, 3)),
    "1024-2048": (Size(1024, 12, 16, 384, 6), Size(2048, 14, 16, 512, 8)),
}


def write_model(folder: Path, size: Size, seed: int, vocabulary: int) -> Path:
    """A LLaVA of random weights, sharpened so that its distributions are not flat."""
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))])}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template=TEMPLATE,
    )
    tokenizer.image_token = "<image>"
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=size.tower,
                intermediate_size=4 * size.tower,
                num_attention_heads=size.tower // 64,
                num_hidden_layers=size.tower_layers,
                image_size=56,
                patch_size=14,
            ),
            text_config=LlamaConfig(
                hidden_size=size.width,
                intermediate_size=size.width * 11 // 4,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                num_key_value_heads=size.heads // 2,
                vocab_size=vocabulary,
                max_position_embeddings=2048,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=1,
            ),
            image_token_id=words["<image>"],
            vision_feature_layer=-1,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


def write_data(folder: Path, samples: int, vocabulary: int) -> Path:
    """Images of noise, with questions and answers of random words."""
    folder.mkdir()
    random = np.random.default_rng(0)

    def words(median: int, most: int) -> str:
        count = int(np.clip(random.lognormal(np.log(median), 0.8), 4, most))
        return " ".join(f"w{i}" for i in random.integers(0, vocabulary - len(SPECIAL), count))

    with (folder / "data.jsonl").open("w") as file:
        for i in range(samples):
            Image.fromarray(random.integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            question = [{"type": "image"}, {"type": "text", "text": words(60, 384)}]
            messages = [{"role": "user", "content": question}]
            messages.append({"role": "assistant", "content": [{"type": "text", "text": words(30, 192)}]})
            file.write(json.dumps({"images": [f"{i}.png"], "messages": messages}) + "\n")
    return folder / "data.jsonl"


class Side(NamedTuple):
    """What is timed: an epoch, which gives its mean loss; and a single step, in which everything is made once."""

    name: str
    epoch: Callable[[], float]
    step: Callable[[], object]


OURS: dict[str, dict[str, Any]] = {
    "padded": {},
    "grouped": {"data": {"length_window": 4}},
    "packed": {"data": {"packing": True}},
    "packed, cached hidden states": {"data": {"packing": True}, "teacher": {"cache": {"form": "hidden"}}},
    "packed, cached top-64": {"data": {"packing": True}, "teacher": {"cache": {"form": "topk", "k": 64}}},
}


def ours(name: str, folder: Path, data: Path, processes: Processes, micro: int, dtype: str) -> Side:
    plain: dict[str, Any] = {
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "loss": [{"name": "forward_kl"}],
        "data": {"train": [{"path": str(data)}], "workers": 0, "max_length": 1024},
        "optimizer": {"lr": TINY_LR, "weight_decay": 0.0, "schedule": "constant", "max_grad_norm": 1.0},
        "training": {"epochs": 1000, "batch_size": micro, "dtype": dtype, "device": processes.device.type},
        "deepspeed": {"stage": 0},
        "output": str(folder / "runs" / name.replace(" ", "_")),
    }
    for section, changes in OURS[name].items():
        plain[section] |= changes
    if "cache" in plain["teacher"]:
        plain["teacher"]["cache"] = {
            "folder": str(folder / plain["teacher"]["cache"]["form"]),
            **plain["teacher"]["cache"],
        }
        fill(RunConfig.model_validate(plain), processes)
    trainer = Trainer(RunConfig.model_validate(plain), processes)
    trainer.engine.train()
    length = int(trainer.epoch_steps)
    done = 0

    def steps(number: int) -> float:
        nonlocal done
        total = tokens = 0.0
        for step in trainer.batches(done, done + number):
            values, _ = trainer.train_step(step, 0.0)
            total += values["loss"] * values["supervised_tokens"]
            tokens += values["supervised_tokens"]
        done += number
        return total / tokens

    def epoch() -> float:
        nonlocal done
        done = -(-done // length) * length
        return steps(length)

    return Side(name, epoch, lambda: steps(1))


def theirs(folder: Path, data: Path, device: str, micro: int, dtype: str) -> Side:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageColumn
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    turn = [{"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}]
    table = Dataset.from_list(
        [
            {
                "images": [str(data.parent / name) for name in row["images"]],
                "prompt": row["messages"][:1],
                "completion": row["messages"][1:],
            }
            for row in rows
        ],
        features=Features({"images": List(ImageColumn()), "prompt": turn, "completion": turn}),
    )
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    losses: list[float] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    def trainer(samples: int, steps: int = -1) -> Any:
        settings = GOLDConfig(
            output_dir=str(folder / "trl"),
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_length=1024,
            per_device_train_batch_size=micro,
            num_train_epochs=1,
            max_steps=steps,
            learning_rate=TINY_LR,
            lr_scheduler_type="constant",
            bf16=dtype == "bf16",
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            disable_tqdm=True,
        )
        return GOLDTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=table.select(range(samples)),
            processing_class=AutoProcessor.from_pretrained(folder / "student", trust_remote_code=False),
            callbacks=[Keep()],
        )

    student = AutoModelForImageTextToText.from_pretrained(
        folder / "student", dtype=torch.float32, trust_remote_code=False
    ).to(device)
    teacher = AutoModelForImageTextToText.from_pretrained(folder / "teacher", dtype=kind, trust_remote_code=False).to(
        device
    )
    whole = trainer(len(rows))

    def epoch() -> float:
        losses.clear()
        whole.train()
        return statistics.mean(losses)

    single = trainer(micro, 1)
    return Side("TRL GOLDTrainer", epoch, single.train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", choices=SIZES)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--micro", type=int, default=8, help="samples of a micro-batch")
    parser.add_argument("--sides", nargs="+", default=list(OURS), choices=OURS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    dtype = "bf16" if cuda else "fp32"
    widths = options.widths or ("1024-2048" if cuda else "256-512")
    clock = time.process_time if options.threads == 1 and not cuda else time.perf_counter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for role, size in zip(("student", "teacher"), SIZES[widths], strict=True):
            write_model(folder / role, size, role == "teacher", options.vocabulary)
        data = write_data(folder / "data", options.samples, options.vocabulary)
        everyone = [theirs(folder, data, options.device, options.micro, dtype)]
        processes = Processes(options.device)
        torch.set_num_threads(options.threads)
        everyone += [ours(side, folder, data, processes, options.micro, dtype) for side in options.sides]
        rows = measure(everyone, data, options.rounds, clock, options.device)
        processes.close()
    about = {
        "widths": widths,
        "vocabulary": options.vocabulary,
        "micro_batch": options.micro,
        "device": torch.cuda.get_device_name() if cuda else f"{processor()}, {options.threads} thread(s)",
        "dtype": dtype,
        "samples": options.samples,
        "clock": clock.__name__,
    }
    if options.output:
        add_rows(options.output, [row | about for row in rows])


def add_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Add rows to a CSV file, which is made if it does not exist."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def lengths(data: Path) -> tuple[list[int], int]:
    """Quartiles of samples' tokens, and supervised tokens of an epoch."""
    whole, supervised = [], 0
    for line in data.read_text().splitlines():
        question, answer = (m["content"][-1]["text"].count(" ") + 1 for m in json.loads(line)["messages"])
        whole.append(1 + 16 + question + 1 + answer + 1)
        supervised += answer + 1
    return [round(q) for q in np.quantile(whole, [0, 0.25, 0.5, 0.75, 1])], supervised


def measure(
    everyone: list[Side], data: Path, rounds: int, clock: Callable[[], float], device: str
) -> list[dict[str, object]]:
    """A row of the table for each side."""
    quartiles, supervised = lengths(data)
    print(f"{supervised} supervised tokens an epoch; tokens a sample: {', '.join(map(str, quartiles))} (quartiles)")
    seconds: dict[str, list[float]] = {side.name: [] for side in everyone}
    losses: dict[str, float] = {}
    for side in everyone:
        side.step()
    for _ in range(rounds):
        for side in everyone:
            began = clock()
            losses[side.name] = side.epoch()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[side.name].append(clock() - began)
    rows: list[dict[str, object]] = []
    first = everyone[0].name
    for side in everyone:
        ratios = [a / b for a, b in zip(seconds[first], seconds[side.name], strict=True)]
        row = {
            "side": side.name,
            "supervised_tokens_per_second": round(supervised / statistics.median(seconds[side.name]), 1),
            "over_trl": round(statistics.median(ratios), 2),
            "over_trl_lowest": round(min(ratios), 2),
            "peak_mib": round(peak_bytes(side.epoch, device) / 2**20, 1),
            "loss": round(losses[side.name], 5),
            "lengths": "/".join(map(str, quartiles)),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
