"""Chunked TAID against full-logit TAID on the CPU: time, peak memory, and the bare matrix products.

    python benchmarks/losses.py [--threads 2] [--repeats 5] [--output benchmarks/results/losses_cpu.csv]
    python benchmarks/losses.py --sweep         chunk sizes instead, at 1024 tokens and a vocabulary of 32k; no CSV

Both sides start from the same hidden states and heads in float32, run forward and backward in one process, and take
turns. The full-logit side is TAID as its authors' code computes it: whole [tokens, vocabulary] logits of both models,
the mixed target's probabilities, the student's log-probabilities, a masked sum, autograd. Peak memory counts every
allocation of torch's CPU allocator in a separate run (profiler), above the inputs and with the gradients; memory inside
the matrix library is not seen. Times are medians; on a busy machine only their ratios mean anything,
and more threads than free cores spoil even those.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vlm_distill.losses import TAID, HiddenTargets, fused_linear

STUDENT_WIDTH, TEACHER_WIDTH, T = 256, 512, 0.4
# (tokens, vocabulary): at 152k the full-logit side would need 4 GB for 1024 tokens, so it gets half of them.
SHAPES = [(1024, 1_000), (1024, 32_768), (512, 151_936)]


class Head:
    """A bare weight as an LMHead."""

    scale, softcap, bias = 1.0, None, None

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    @contextmanager
    def weight(self):
        yield self._weight


class Case:
    """Hidden states and heads of one shape, and the three things that are timed."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, STUDENT_WIDTH, requires_grad=True)
        self.weight = (torch.randn(vocabulary, STUDENT_WIDTH) / STUDENT_WIDTH**0.5).requires_grad_()
        self.teacher_hidden = torch.randn(tokens, TEACHER_WIDTH)
        self.teacher_weight = torch.randn(vocabulary, TEACHER_WIDTH) / TEACHER_WIDTH**0.5
        self.mask = torch.ones(tokens)
        self.loss = TAID(t_start=T)

    def chunked(self, chunk_bytes: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = HiddenTargets(self.teacher_hidden, Head(self.teacher_weight))
        scales = {"loss": 1.0 / len(self.hidden)}
        head = Head(self.weight)
        sums = fused_linear(self.loss, self.hidden, head, teacher, scales=scales, chunk_bytes=chunk_bytes)
        return torch.autograd.grad(sums.loss, (self.hidden, self.weight))

    def full(self) -> tuple[torch.Tensor, torch.Tensor]:
        student = self.hidden @ self.weight.t()
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.t()
        target = ((1 - T) * student.detach() + T * teacher).softmax(-1, dtype=torch.float32)
        log_q = student.log_softmax(-1, dtype=torch.float32)
        rows = (target * log_q).masked_fill(student.isinf(), 0).sum(-1)
        loss = -(rows * self.mask).sum() / self.mask.sum()
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    @torch.no_grad()
    def products(self) -> None:
        """The matrix products that neither side can do without."""
        logits = self.hidden @ self.weight.t()
        self.teacher_hidden @ self.teacher_weight.t()
        logits @ self.weight
        logits.t() @ self.hidden


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held during ``run`` above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def measure(tokens: int, vocabulary: int, repeats: int) -> dict[str, float]:
    case = Case(tokens, vocabulary)
    chunked, full = case.chunked(), case.full()  # also the warm-up
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(chunked, full, strict=True))
    if not error < 1e-4:
        raise SystemExit(f"the two sides' gradients differ by {error:.1e} at vocabulary {vocabulary}")
    del chunked, full
    times: dict[str, list[float]] = {"products": [], "chunked": [], "full": []}
    for _ in range(repeats):
        for name, taken in times.items():
            taken.append(seconds(getattr(case, name)))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    peaks = {name: peak_bytes(getattr(case, name)) for name in ("chunked", "full")}
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "student_width": STUDENT_WIDTH,
        "teacher_width": TEACHER_WIDTH,
        "products_s": round(median["products"], 4),
        "chunked_s": round(median["chunked"], 4),
        "full_s": round(median["full"], 4),
        "chunked_over_products": round(median["chunked"] / median["products"], 3),
        "full_over_products": round(median["full"] / median["products"], 3),
        "full_over_chunked_time": round(median["full"] / median["chunked"], 3),
        "chunked_peak_mib": round(peaks["chunked"] / 2**20, 1),
        "full_peak_mib": round(peaks["full"] / 2**20, 1),
        "full_over_chunked_memory": round(peaks["full"] / peaks["chunked"], 2),
        "gradient_difference": float(f"{error:.1e}"),
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def sweep(repeats: int) -> None:
    """Prints the chunked side's time over the bare products for several chunk sizes."""
    case = Case(1024, 32_768)
    sizes = [2**power for power in range(23, 30)]
    times: dict[int, list[float]] = {0: [], **{size: [] for size in sizes}}
    for _ in range(repeats + 1):  # the first round is the warm-up
        for size, taken in times.items():
            taken.append(seconds(lambda size=size: case.chunked(size)) if size else seconds(case.products))
    median = {size: statistics.median(taken[1:]) for size, taken in times.items()}
    for size in sizes:
        print(f"{size >> 20:4} MiB: {median[size] / median[0]:.2f} times the bare products")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "losses_cpu.csv")
    parser.add_argument("--sweep", action="store_true", help="compare chunk sizes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sweep:
        sweep(options.repeats)
        return
    results = []
    print(
        "tokens  vocabulary | over bare products: chunked   full | full/chunked: time  memory | peak MiB: chunked  full"
    )
    for tokens, vocabulary in SHAPES:
        r = measure(tokens, vocabulary, options.repeats)
        results.append(r)
        print(
            f"{tokens:6} {vocabulary:11,} | {r['chunked_over_products']:27.2f} {r['full_over_products']:6.2f} "
            f"| {r['full_over_chunked_time']:18.2f} {r['full_over_chunked_memory']:7.2f} "
            f"| {r['chunked_peak_mib']:17.0f} {r['full_peak_mib']:5.0f}",
            flush=True,
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(results)


if __name__ == "__main__":
    main()
