"""One optimizer step of image distillation, ours against a plain loop and timm's task: time and peak memory.

    python benchmarks/vision_speed.py [--threads 1] [--rounds 9] [--batch N] [--output FILE.csv]
    python benchmarks/vision_speed.py --device cuda    large batches, bfloat16, compile; benchmarks/gpu.sh runs it

Knowledge distillation with temperature 4 (weight 0.9) and cross-entropy (0.1), SGD with momentum. All sides start from
the same weights, see the same images and must give the same losses; they take turns step by step in one process. The
sides:

- ours: the trainer's own step on a ready batch of 8-bit images: normalisation, teacher, student, losses, DeepSpeed
  (ZeRO 0), sums over ranks, and every number that goes into the log.
- plain: a training loop as distillation papers write it: images normalised beforehand, autograd through
  ``kl_div`` and ``cross_entropy``, torch's SGD, and the loss read on the CPU in each iteration.
- timm: ``LogitDistillationTask`` (what timm's training script runs for ``--kd``) on batches of timm's
  ``PrefetchLoader`` (8-bit images, normalised on the device), with timm's SGD; the loss is read in each iteration.

A ratio is the median over rounds of one side's time over ours in the same round: what else runs on the machine hits
both. With one thread on a CPU a step's time is the processor's, which others hardly change; otherwise it is the clock's
(column clock). In ``loop`` cases images are JPEGs of 500 × 375 pixels which one worker decodes and augments, by timm's
default augmentation on both sides, and ``waiting`` is the share of time spent waiting for it; ``loader`` cases only
load.

Peak memory is above the weights, the optimizer's state and the gradients: on a CPU what torch's allocator held in a
step of its own under the profiler, on a GPU ``max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.loader import PrefetchLoader
from timm.optim import create_optimizer_v2
from timm.task import DistillationTeacher, LogitDistillationTask
from torch import Tensor

from data.batch import Step
from vision.config import ClassifierConfig
from vision.loader import ImageBatch
from vision.trainer import Trainer
from vlm_distill.runtime.processes import Processes

sys.path.append(str(Path(__file__).parent))
from losses import peak_bytes, processor  # benchmarks/losses.py

TEMPERATURE, KD, CE = 4.0, 0.9, 0.1
LR, MOMENTUM, DECAY = 1e-3, 0.9, 1e-4
JPEGS = 512


class Case(NamedTuple):
    """A case to time. ``kind``: ``step`` on a ready batch, ``loop`` with the loader, ``loader`` alone."""

    student: str
    teacher: str
    size: int
    batch: int
    classes: int
    kind: str = "step"
    dtype: str = "fp32"
    channels_last: bool = False
    compile: bool = False


IMAGENET = partial(Case, "resnet18", "resnet34", 224, classes=1000)
CIFAR = partial(Case, "cifar_resnet20", "cifar_resnet56", 32, batch=64, classes=100)
CPU_CASES = [
    # Small batches: the cost of a step outside the models weighs more.
    IMAGENET(batch=8),
    IMAGENET(batch=8, channels_last=True),
    CIFAR(),
    CIFAR(channels_last=True),
    IMAGENET(batch=16, kind="loop", channels_last=True),
    IMAGENET(batch=32, kind="loader"),
]
GPU_CASES = [
    IMAGENET(batch=256),
    IMAGENET(batch=256, channels_last=True),
    IMAGENET(batch=256, dtype="bf16", channels_last=True),
    CIFAR(),
    CIFAR(dtype="bf16", channels_last=True),
    # Last, as compiling takes most of the time.
    IMAGENET(batch=256, dtype="bf16", channels_last=True, compile=True),
    CIFAR(dtype="bf16", channels_last=True, compile=True),
]


def write_images(folder: Path, case: Case) -> Path:
    """Write the JPEGs that the loader needs, a folder for each class: smooth shapes with noise, about 100 kB each."""
    generator = np.random.default_rng(0)
    width, height = (500, 375) if case.kind != "step" else (case.size, case.size)
    pictures = []
    for _ in range(16):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(coarse, dtype=np.float32) + generator.normal(0, 12, (height, width, 3))
        pictures.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    for number in range(max(case.classes, JPEGS if case.kind != "step" else 0)):
        path = folder / f"c{number % case.classes:04}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        pictures[number % len(pictures)].save(path, quality=90)
    return folder


def our_trainer(case: Case, images: Path, out: Path, processes: Processes) -> Trainer:
    return Trainer(
        ClassifierConfig.model_validate(
            {
                "student": {"name": case.student},
                "teacher": {"name": case.teacher},
                "loss": [
                    {"name": "kd", "temperature": TEMPERATURE, "weight": KD},
                    {"name": "cross_entropy", "weight": CE},
                ],
                "data": {"train": [{"path": str(images)}], "workers": 1},
                "optimizer": {
                    "name": "momentum",
                    "lr": LR,
                    "momentum": MOMENTUM,
                    "weight_decay": DECAY,
                    "decay": "all",
                    "schedule": "constant",
                },
                "training": {
                    "steps": 1_000_000,
                    "batch_size": case.batch,
                    "device": processes.device.type,
                    "dtype": case.dtype,
                    "channels_last": case.channels_last,
                    "compile": case.compile,
                },
                "output": str(out),
            }
        ),
        processes,
    )


class Bench:
    """The three sides of a case on one batch; each call of a side is one optimizer step and gives its loss."""

    def __init__(self, case: Case, folder: Path, processes: Processes) -> None:
        self.case, self.device = case, processes.device
        images = folder / "images"
        images.mkdir()
        self.images = write_images(images, case)
        self.trainer = our_trainer(case, self.images, folder / "run", processes)
        self.trainer.engine.train()
        teacher = self.trainer.loss_teacher
        assert teacher is not None
        inputs = self.trainer.student.inputs
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, 3, case.size, case.size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(0, case.classes, (case.batch,), generator=generator)
        # As each side's loader gives them: ours in the memory format of decoded images.
        self.pixels = pixels
        empty = torch.empty(0, dtype=torch.int64)
        ours = pixels.contiguous(memory_format=torch.channels_last)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (inputs.mean, inputs.std))
        self.floats = (pixels.float() / 255 - mean) / std
        if self.device.type == "cuda":
            self.pixels, self.floats, self.labels, ours = (
                x.pin_memory() for x in (self.pixels, self.floats, self.labels, ours)
            )
        self.step = Step(0, [ImageBatch(ours, self.labels, empty, empty)], [])
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=case.dtype == "bf16")
        self.format = torch.channels_last if case.channels_last else torch.contiguous_format
        student = self.trainer.student.model
        self.plain_student, self.timm_student = deepcopy(student), deepcopy(student)
        self.teacher = deepcopy(teacher.classifier.model)
        self.plain_optimizer = torch.optim.SGD(
            self.plain_student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY
        )
        self.timm_optimizer = create_optimizer_v2(
            self.timm_student, "momentum", lr=LR, momentum=MOMENTUM, weight_decay=DECAY, filter_bias_and_bn=False
        )
        self.task = LogitDistillationTask(
            self.timm_student,
            DistillationTeacher(deepcopy(self.teacher), device=self.device),
            torch.nn.CrossEntropyLoss(),
            distill_loss_weight=KD,
            task_loss_weight=CE,
            temperature=TEMPERATURE,
            device=self.device,
            verbose=False,
        )
        if case.compile:
            self.plain_student.compile()
            self.teacher.compile()
            self.task.compile()
        self.task.train()
        self.plain_student.train()
        self.inputs = inputs
        self.prefetched = iter(self._prefetch(repeat((self.pixels, self.labels))))

    def _prefetch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> PrefetchLoader:
        return PrefetchLoader(batches, self.inputs.mean, self.inputs.std, device=self.device)

    def ours(self) -> float:
        return self.trainer.train_step(self.step, 0.0)[0]["loss"]

    def plain(self) -> float:
        images = self.floats.to(self.device, non_blocking=True, memory_format=self.format)
        labels = self.labels.to(self.device, non_blocking=True)
        self.plain_optimizer.zero_grad()
        with self.autocast():
            logits = self.plain_student(images)
            with torch.no_grad():
                wanted = self.teacher(images)
            kd = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), F.softmax(wanted / TEMPERATURE, 1), reduction="none")
            loss = KD * TEMPERATURE**2 * kd.sum(1).mean() + CE * F.cross_entropy(logits, labels)
        loss.backward()
        self.plain_optimizer.step()
        return float(loss.detach().cpu())

    def timm(self) -> float:
        return self.timm_step(*next(self.prefetched))

    def timm_step(self, images: Tensor, labels: Tensor) -> float:
        if self.case.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            loss = self.task(images, labels)["loss"]
        seen = loss.item()
        loss.backward()
        self.timm_optimizer.step()
        self.timm_optimizer.zero_grad()
        return seen

    def our_loader(self) -> Iterator[Step]:
        return self.trainer.batches(0, 1_000_000)

    def timm_loader(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = create_loader(
            create_dataset("", str(self.images)),
            (3, *self.inputs.size),
            self.case.batch,
            is_training=True,
            interpolation="random",
            mean=self.inputs.mean,
            std=self.inputs.std,
            num_workers=1,
            device=self.device,
            pin_memory=self.device.type == "cuda",
        )
        while True:
            yield from loader


def seconds(run: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if clock_of(device) == "processor" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def clock_of(device: torch.device, kind: str = "step") -> str:
    """Return the clock to use: CPU time would count threads' waiting for each other, and miss a loader's processes."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and kind == "step"
    return "processor" if alone else "wall"


def time_steps(bench: Bench, rounds: int, steps: int) -> dict[str, dict[str, object]]:
    """Time a step of each side; several steps at a time if one is short."""
    sides = {"ours": bench.ours, "plain": bench.plain, "timm": bench.timm}
    limit = 1e-4 if bench.case.dtype == "fp32" else 2e-2
    for number in range(3):  # the warm-up, too; after a step the weights must agree as well
        losses = {name: run() for name, run in sides.items()}
        if not all(abs(loss / losses["plain"] - 1) < limit for loss in losses.values()):
            raise SystemExit(f"the sides' losses differ in step {number}: {losses}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for number in range(rounds):
        for name in order[number % 3 :] + order[: number % 3]:
            run = sides[name]
            times[name].append(seconds(lambda run=run: [run() for _ in range(steps)], bench.device) / steps)
    rows = {name: summary(taken, times["ours"], bench.case.batch) for name, taken in times.items()}
    for name, run in sides.items():
        rows[name]["peak_mib"] = round(peak_bytes(run, bench.device.type) / 2**20, 1)
    return rows


def time_loops(bench: Bench, rounds: int, steps: int) -> dict[str, dict[str, object]]:
    """Time a step with its loading for each side, ``steps`` at a time, so that prefetched batches do not count."""
    train = bench.case.kind == "loop"

    def our_part(loader: Iterator[Step]) -> float:
        waited = 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            step = next(loader)
            waited += time.perf_counter() - asked
            if train:
                bench.trainer.train_step(step, 0.0)
        return waited

    def timm_part(loader: Iterator[tuple[Tensor, Tensor]]) -> float:
        waited = 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            images, labels = next(loader)
            waited += time.perf_counter() - asked
            if train:
                bench.timm_step(images, labels)
        return waited

    parts: dict[str, tuple[Callable[..., float], Callable[[], Iterator]]] = {
        "ours": (our_part, bench.our_loader),
        "timm": (timm_part, bench.timm_loader),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    waiting: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds):
        for name in list(parts)[:: 1 if number % 2 else -1]:
            part, make = parts[name]
            # One loader at a time: an idle one would prefetch on the other's cores.
            loader = make()
            part(loader)
            start = time.perf_counter()
            waited = part(loader)
            times[name].append((time.perf_counter() - start) / steps)
            waiting[name].append(waited / steps / times[name][-1])
            del loader
    rows = {name: summary(taken, times["ours"], bench.case.batch) for name, taken in times.items()}
    for name, shares in waiting.items():
        rows[name]["waiting"] = round(statistics.median(shares), 3)
    return rows


def summary(taken: Sequence[float], ours: Sequence[float], batch: int) -> dict[str, object]:
    median = statistics.median(taken)
    return {
        "seconds": round(median, 5),
        "least_seconds": round(min(taken), 5),
        "images_per_second": round(batch / median, 1),
        "over_ours": round(statistics.median(a / b for a, b in zip(taken, ours, strict=True)), 3),
        "least_over_ours": round(min(taken) / min(ours), 3),
    }


def measure(case: Case, rounds: int, processes: Processes) -> list[dict[str, object]]:
    """Return a row of the table for every side."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(case, Path(folder), processes)
        if case.kind == "step":
            steps = 1 if processes.device.type == "cpu" else 10
            rows = time_steps(bench, rounds, steps)
        else:
            steps = 4 if case.kind == "loop" else 8
            rounds = max(1, rounds // 3)
            rows = time_loops(bench, rounds, steps)
    name = torch.cuda.get_device_name() if processes.device.type == "cuda" else processor()
    blank: dict[str, object] = {"peak_mib": "", "waiting": ""}
    about: dict[str, object] = {"clock": clock_of(processes.device, case.kind), "rounds": rounds}
    about |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    return [
        {"device": name, **case._asdict(), "side": side} | row | {k: row.get(k, v) for k, v in blank.items()} | about
        for side, row in rows.items()
    ]


def show(rows: list[dict[str, object]]) -> None:
    r = rows[0]
    flags = " ".join(flag for flag in ("channels_last", "compile") if r[flag])
    print(f"\n{r['teacher']} → {r['student']}, {r['size']}², batch {r['batch']}, {r['kind']}, {r['dtype']} {flags}")
    print("side      seconds  images/s   /ours  least/ours  peak MiB  waiting")
    for r in rows:
        print(
            f"{r['side']:8} {r['seconds']:8.4f} {r['images_per_second']:9.1f} {r['over_ours']:7.3f} "
            f"{r['least_over_ours']:11.3f} {r['peak_mib']:>9} {r['waiting']:>8}",
            flush=True,
        )


def main(words: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="images in a batch, instead of the cases' own number")
    parser.add_argument("--only", help="of the cases those whose student or kind is this")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(words)
    processes = Processes(options.device)
    torch.set_num_threads(options.threads)
    output = options.output or Path(__file__).parent / "results" / "vision_speed.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, object]] = []
    try:
        for case in cases or (GPU_CASES if options.device == "cuda" else CPU_CASES):
            if options.only in (None, case.student, case.kind):
                rows = measure(case._replace(batch=options.batch or case.batch), options.rounds, processes)
                results += rows
                show(rows)
                # After every case, so that an interrupted run keeps what it has measured.
                with output.open("w", newline="") as file:
                    writer = csv.DictWriter(file, results[0], lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(results)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
