"""`vlm-distill plan` against measurement: the peak of live tensor bytes of real training steps, in three runs.

    python benchmarks/planning.py [--only NAME] [--output FILE.csv]
    torchrun --nproc-per-node 2 benchmarks/planning.py --only sharded

Each configuration is planned, then built and trained for two optimizer steps. The storages of all tensors made
on the way are counted while they live, and their peak during the second step is compared with the plan.
PyTorch's profiler counts the same on one rank; of several it misses what gloo's threads free. All rows are of one
length, so that every micro-batch is the one that was planned.
On a machine with a GPU, `max_memory_allocated` of the same steps is what is compared (--device cuda).

- composed: a ViT, an mlp and a Llama taught by a model of the same kind, float32, ZeRO-0.
- llava: Transformers' LLaVA with a CLIP tower, taught by another, activations recomputed, float32, ZeRO-1.
- language: a Llama taught by another, bf16, ZeRO-2.
- sharded: a wider one with short rows, float32, ZeRO-3: parameters are nearly all of it.
- resnet: a classifier, ResNet-56 to ResNet-20 for CIFAR by TAID, float32, ZeRO-0, SGD with momentum.
- deit: a small vision transformer with a distillation token, mixed images, bf16, ZeRO-1, AdamW.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from vision.config import ClassifierConfig
from vision.planning import plan as plan_classifier
from vlm_distill import models
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.models.weightless import tensors_in
from vlm_distill.planning import plan

WORDS = [f"w{i}" for i in range(1500)]
SAMPLES = 32
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _decoder(width: int, layers: int) -> dict[str, Any]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers}
    return {"config": {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width} | heads}


def _composed(width: int, layers: int) -> dict[str, Any]:
    tower = {"patch_size": 8, "embed_dim": width, "depth": layers, "num_heads": 4}
    return {
        "vision_encoder": {"source": "timm", "name": "vit_tiny_patch16_224", "config": tower, "image_size": 64},
        "projector": {"type": "mlp"},
        "decoder": _decoder(width, layers),
    }


def _llava(folder: Path, width: int, layers: int) -> str:
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = make_tokenizer(WORDS)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.image_token = "<image>"
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, num_hidden_layers=layers, image_size=56, patch_size=7),
        text_config=LlamaConfig(**shape, num_hidden_layers=layers, num_key_value_heads=2, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    LlavaProcessor(
        images, tokenizer, 7, "default", TEMPLATE, num_additional_image_tokens=1, image_token="<image>"
    ).save_pretrained(folder)
    return str(folder)


def _saved(folder: Path, settings: dict[str, Any]) -> str:
    models.build_vlm(settings, tokenizer=make_tokenizer(WORDS)).save_pretrained(folder)
    return str(folder)


def _run(folder: Path, student: dict[str, Any], teacher: str, data: Path, **changes: Any) -> RunConfig:
    training = {"steps": 2, "batch_size": 16, "micro_batch_size": 8, "device": "cpu", "checkpoint_every": 99}
    plain = {
        "student": student,
        "teacher": {"path": teacher},
        "loss": [{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}],
        "data": {"train": [{"path": str(data)}], "workers": 0, "max_length": 512},
        "training": training | changes.pop("training", {}),
        "deepspeed": {"stage": changes.pop("stage")},
        "output": str(folder / "run"),
    }
    return RunConfig.model_validate(plain | changes)


def _data(folder: Path, *, images: bool, words: int = 96) -> Path:
    """Write rows of one length with different words and pictures."""
    lines = []
    for i in range(SAMPLES):
        text = [WORDS[(31 * i + k) % len(WORDS)] for k in range(words)]
        question, answer = " ".join(text[: words // 2]), " ".join(text[words // 2 :])
        row: dict[str, Any] = {"id": str(i)}
        if images:
            Image.new("RGB", (64, 64), (7 * i, 0, 0)).save(folder / f"{i}.png")
            row["image"], question = f"{i}.png", "<image>" + question
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps(row) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return folder / "data.jsonl"


def composed(folder: Path) -> RunConfig:
    teacher = _saved(folder / "teacher", _composed(96, 3))
    return _run(folder, _composed(64, 3), teacher, _data(folder, images=True), stage=0)


def llava(folder: Path) -> RunConfig:
    teacher, student = _llava(folder / "teacher", 96, 3), _llava(folder / "student", 64, 6)
    recomputed = {"training": {"activation_checkpointing": True}}
    return _run(folder, {"path": student}, teacher, _data(folder, images=True), stage=1, **recomputed)


def language(folder: Path) -> RunConfig:
    teacher = _saved(folder / "teacher", {"decoder": _decoder(96, 4)})
    student = {"decoder": _decoder(64, 4)}
    data = _data(folder, images=False, words=192)
    return _run(folder, student, teacher, data, stage=2, training={"dtype": "bf16"})


def sharded(folder: Path) -> RunConfig:
    teacher = _saved(folder / "teacher", {"decoder": _decoder(32, 1)})
    data = _data(folder, images=False, words=24)
    return _run(folder, {"decoder": _decoder(256, 4)}, teacher, data, stage=3)


def _classifier(folder: Path, student: dict[str, Any], teacher: dict[str, Any], **changes: Any) -> ClassifierConfig:
    for label in range(10):
        (folder / "images" / f"class{label}").mkdir(parents=True)
        for number in range(13):
            Image.new("RGB", (32, 32), (20 * label, 9 * number, 0)).save(
                folder / "images" / f"class{label}" / f"{number}.png"
            )
    training = {"steps": 2, "batch_size": 64, "micro_batch_size": 32, "device": "cpu", "checkpoint_every": 99}
    plain = {
        "student": student,
        "teacher": teacher,
        "data": {"train": [{"path": str(folder / "images")}], "workers": 0} | changes.pop("data", {}),
        "training": training | changes.pop("training", {}),
        "output": str(folder / "run"),
    }
    return ClassifierConfig.model_validate(plain | changes)


def resnet(folder: Path) -> ClassifierConfig:
    loss = [{"name": "taid"}, {"name": "cross_entropy"}]
    return _classifier(folder, {"name": "cifar_resnet20"}, {"name": "cifar_resnet56"}, loss=loss)


def deit(folder: Path) -> ClassifierConfig:
    shape = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    student = {"name": "deit_tiny_distilled_patch16_224", "image_size": 32, "config": shape}
    teacher = {"name": "resnet18", "image_size": 48, "mean": [0.4, 0.4, 0.4]}
    return _classifier(
        folder,
        student,
        teacher,
        loss=[{"name": "kd"}, {"name": "cross_entropy"}],
        data={"mixing": {"mixup": 0.8}},
        optimizer={"name": "adamw", "lr": 1e-3},
        training={"dtype": "bf16"},
        deepspeed={"stage": 1},
    )


CONFIGURATIONS: dict[str, Callable[[Path], RunConfig | ClassifierConfig]] = {
    "composed": composed,
    "llava": llava,
    "language": language,
    "sharded": sharded,
    "resnet": resnet,
    "deit": deit,
}


class _Live(TorchDispatchMode):
    """Counts the bytes of live tensors made since it was opened, and their peak since ``peak`` was set."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if tensor.device.type != "meta" and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def measure(config: RunConfig | ClassifierConfig) -> int:
    """Return the peak of this rank's live tensor bytes in the second optimizer step."""
    from vlm_distill.runtime.processes import Processes

    trainer_of: Any
    if isinstance(config, RunConfig):
        from vlm_distill.trainer import Trainer as trainer_of
    else:
        from vision.trainer import Trainer as trainer_of

    processes = Processes(config.training.device)
    on_gpu = processes.device.type == "cuda"
    gc.collect()
    try:
        counted = _Live()
        with nullcontext() if on_gpu else counted:
            trainer = trainer_of(config, processes)
            trainer.engine.train()
            for step in trainer.batches(0, 2):
                counted.peak = counted.live
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                trainer.train_step(step, 0.0)
            del trainer, step
        return torch.cuda.max_memory_allocated() if on_gpu else counted.peak
    finally:
        processes.close()


def compare(name: str, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Return a row of the table: plan and measurement, in bytes."""
    torch.manual_seed(0)
    config = CONFIGURATIONS[name](folder)
    if device == "cuda":
        config = config.model_copy(update={"training": config.training.model_copy(update={"device": "cuda"})})
    began = time.perf_counter()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    make_plan: Any = plan if isinstance(config, RunConfig) else plan_classifier
    planned = make_plan(config, gpus=ranks, memory=16, device="cpu" if device == "cpu" else "h100")
    seconds = time.perf_counter() - began
    row = planned.memory[planned.configured]
    measured = measure(config)
    return {
        "configuration": name,
        "device": device,
        "ranks": ranks,
        "stage": row.stage,
        "dtype": config.training.dtype,
        "planned": row.peak,
        "measured": measured,
        "error": round(row.peak / measured - 1, 4),
        "of it activations": row.activations,
        "seconds to plan": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name in [options.only] if options.only else CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(name, Path(folder), options.device))
        if os.environ.get("RANK", "0") == "0":
            print(rows[-1], flush=True)
    if options.output is not None and os.environ.get("RANK", "0") == "0":
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
