"""Losses straight from hidden states, ours and other projects': time, peak memory, and the bare matrix products.

    python benchmarks/losses.py [--device cpu] [--threads 2] [--repeats 5] [--output FILE.csv]
    python benchmarks/losses.py --device cuda       bfloat16, four large shapes; benchmarks/gpu.sh runs it
    python benchmarks/losses.py --sweep             chunk sizes instead, at 1024 tokens and a vocabulary of 32k; no CSV

All sides start from the same hidden states and heads, run forward and backward in one process, and take turns; times
are medians. The sides:

- products: the four matrix products that no side does without, logits in float32. The floor.
- ours, ours_recompute: ``fused_linear`` without and with ``recompute``.
- full: TAID as its authors' code computes it: whole [tokens, vocabulary] logits of both models, the mixed target's
  probabilities, the student's log-probabilities, a masked sum, autograd.
- trl_chunked: TRL's ``ChunkedDivergenceFunction``, tiles and recomputation.
- liger_compiled, liger_chunked: Liger Kernel's ``LigerFusedLinearJSDLoss``, through torch.compile (its default, needs a
  compiler on a CPU) and without, each at the chunk size that is faster here (column setting).
- liger_fused: Liger Kernel's ``LigerFusedLinearJSD`` with a float32 accumulator, Triton (GPU only).

TRL and Liger Kernel have no TAID. They are compared on the JSD at β = ½ and on forward KL, and ours on those beside
them; forward KL is also what TAID costs. A peer that is not installed is left out (``pip install vlm-distill[bench]``).

Peak memory is above the inputs: on a CPU what torch's allocator held in a run of its own under the profiler (memory
inside the matrix library is not seen), on a GPU ``max_memory_allocated``. Where other programs share the machine only
ratios mean anything, and more threads than free cores spoil even those.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, fused_linear

T = 0.4
LOSSES = {
    "taid": losses.build("taid", t_start=T),
    "jsd": losses.build("jsd"),
    "forward_kl": losses.build("forward_kl"),
    "alpha_beta": losses.build("alpha_beta"),
    "todi": losses.build("todi"),
}
BETAS = {"jsd": 0.5, "forward_kl": 0.0}  # in TRL's and Liger Kernel's convention


class Shape(NamedTuple):
    tokens: int
    vocabulary: int
    student_width: int
    teacher_width: int
    compared: Literal["peers", "whole logits", "nothing"] = "peers"


# At 152k the full-logit side would need 4 GB for 1024 tokens, so it gets half of them. The last shape is a term with
# `on: images` at four images of 1024 tokens, for its memory.
CPU_SHAPES = [
    Shape(1024, 32_768, 256, 512),
    Shape(1024, 1_000, 256, 512, "whole logits"),
    Shape(512, 151_936, 256, 512, "whole logits"),
    Shape(4096, 32_768, 256, 512, "nothing"),
]
GPU_SHAPES = [Shape(tokens, vocabulary, 2048, 4096) for tokens in (4096, 16_384) for vocabulary in (92_553, 151_936)]


class Head:
    """A bare weight as an LMHead."""

    scale, softcap, bias = 1.0, None, None

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    @contextmanager
    def weight(self):
        yield self._weight


class Case:
    """Hidden states and heads of one shape, and what is timed; every side returns the gradients by both."""

    def __init__(self, shape: Shape, device: str = "cpu") -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        tokens, vocabulary, student, teacher, _ = shape

        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*size, device=device).mul_(scale).to(dtype)

        self.hidden = random(tokens, student).requires_grad_()
        self.weight = random(vocabulary, student, scale=student**-0.5).requires_grad_()
        self.teacher_hidden = random(tokens, teacher)
        self.teacher_weight = random(vocabulary, teacher, scale=teacher**-0.5)
        self.mask = torch.ones(tokens, device=device)
        self.labels = torch.zeros(tokens, dtype=torch.long, device=device)
        self.wide = {"out_dtype": torch.float32} if dtype == torch.bfloat16 else {}
        self.device, self.dtype = device, dtype

    def _gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def ours(self, name: str, *, recompute: bool = False, chunk_bytes: int | None = None) -> tuple[torch.Tensor, ...]:
        teacher = HiddenTargets(self.teacher_hidden, Head(self.teacher_weight))
        sums = fused_linear(
            LOSSES[name],
            self.hidden,
            Head(self.weight),
            teacher,
            scales={"loss": 1.0 / len(self.hidden)},
            chunk_bytes=chunk_bytes,
            recompute=recompute,
        )
        return self._gradients(sums.loss)

    def full(self) -> tuple[torch.Tensor, ...]:
        student = self.hidden @ self.weight.t()
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.t()
        target = ((1 - T) * student.detach() + T * teacher).softmax(-1, dtype=torch.float32)
        log_q = student.log_softmax(-1, dtype=torch.float32)
        rows = (target * log_q).masked_fill(student.isinf(), 0).sum(-1)
        return self._gradients(-(rows * self.mask).sum() / self.mask.sum())

    def trl_chunked(self, name: str) -> tuple[torch.Tensor, ...]:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        sides = (self.hidden, self.weight, None, self.teacher_hidden, self.teacher_weight, None)
        divergence, _ = ChunkedDivergenceFunction.apply(*sides, BETAS[name])
        return self._gradients(divergence.mean())

    def liger_chunked(self, name: str, *, compiled: bool, chunk_size: int) -> tuple[torch.Tensor, ...]:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETAS[name], compiled=compiled, chunk_size=chunk_size)
        return self._gradients(loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.labels))

    def liger_fused(self, name: str) -> tuple[torch.Tensor, ...]:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=BETAS[name], accum_dtype=torch.float32)
        return self._gradients(loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, None))

    @torch.no_grad()
    def products(self) -> None:
        torch.mm(self.teacher_hidden, self.teacher_weight.t(), **self.wide)
        logits = torch.mm(self.hidden, self.weight.t(), **self.wide)
        # In 16 bit the gradient of the logits is rounded for its products; here it is memory of that shape.
        grad = logits if logits.dtype == self.dtype else logits.view(self.dtype)[:, : logits.shape[1]]
        torch.mm(grad, self.weight, **self.wide)
        torch.mm(grad.t(), self.hidden, **self.wide)


class Side(NamedTuple):
    name: str
    loss: str
    run: Callable[[], object]
    setting: str = ""


def sides(case: Case, shape: Shape, *, alone: bool = False) -> list[Side]:
    """The floor, ours, and, unless ``alone``, the peers that are installed and run here."""
    found = [Side("products", "", case.products), Side("ours", "taid", lambda: case.ours("taid"))]
    if shape.compared != "nothing":
        found.append(Side("ours_recompute", "taid", lambda: case.ours("taid", recompute=True)))
        found.append(Side("full", "taid", case.full))
    for name in ("alpha_beta", "todi") if shape.compared == "peers" else ():
        found.append(Side("ours", name, lambda name=name: case.ours(name)))
    for name in BETAS if shape.compared == "peers" else ():
        found.append(Side("ours", name, lambda name=name: case.ours(name)))
        found.append(Side("ours_recompute", name, lambda name=name: case.ours(name, recompute=True)))
        if alone:
            continue
        found.append(Side("trl_chunked", name, lambda name=name: case.trl_chunked(name)))
        for compiled in (True, False):
            variants = [
                Side(
                    "liger_compiled" if compiled else "liger_chunked",
                    name,
                    lambda name=name, compiled=compiled, size=size: case.liger_chunked(
                        name, compiled=compiled, chunk_size=size
                    ),
                    f"chunk_size={size}",
                )
                for size in ((1024,) if case.device == "cuda" else (1024, 256))
            ]
            found.append(_fastest(variants, case.device))
        if case.device == "cuda":
            found.append(Side("liger_fused", name, lambda name=name: case.liger_fused(name), "accum_dtype=float32"))
    return [side for side in found if _runs(side)]


def _runs(side: Side) -> bool:
    """Runs a side once, as its warm-up too."""
    try:
        side.run()
    except Exception as error:  # other projects' code: whatever it raises, the table goes on without it and says so
        if side.name in ("products", "ours", "ours_recompute"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"{side.name} {side.loss} {side.setting} is left out: {reason}", flush=True)
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def _fastest(variants: list[Side], device: str) -> Side:
    """The variant that takes the least time of those that run; the first if none does."""
    timed = [(seconds(side.run, device), side) for side in variants if _runs(side)]
    return min(timed, key=lambda pair: pair[0])[1] if timed else variants[0]


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that torch's allocator held during ``run`` above what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def measure(shape: Shape, repeats: int, device: str = "cpu", *, alone: bool = False) -> list[dict[str, object]]:
    """A row of the table for every side that runs; ``alone``: without other projects'."""
    case = Case(shape, device)
    everyone = sides(case, shape, alone=alone)
    # bfloat16 rounds the logits and their gradients in some peers; ours and autograd's whole logits have to agree.
    limit = 1e-4 if case.dtype == torch.float32 else 5e-2
    differences = {}
    for name in LOSSES:
        group = [side for side in everyone if side.loss == name]
        if group:
            ours = group[0].run()
            for side in group:
                differences[side] = _difference(side.run(), ours)
                if side.name in ("ours", "ours_recompute", "full") and not differences[side] < limit:
                    raise SystemExit(f"{side.name} and ours differ in {name}'s gradients by {differences[side]:.1e}")
            del ours
    times: dict[Side, list[float]] = {side: [] for side in everyone}
    for _ in range(repeats):
        for side, taken in times.items():
            taken.append(seconds(side.run, device))
    median = {side: statistics.median(taken) for side, taken in times.items()}
    floor = next(value for side, value in median.items() if side.name == "products")
    ours_at = {side.loss: value for side, value in median.items() if side.name == "ours"}
    returned = sum(x.numel() * x.element_size() for x in (case.hidden, case.weight))
    accumulator = case.weight.numel() * 4 if case.dtype != torch.float32 else 0
    rows: list[dict[str, object]] = []
    for side, value in median.items():
        peak = peak_bytes(side.run, device)
        rows.append(
            {
                "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
                "dtype": str(case.dtype).removeprefix("torch."),
                **shape._asdict(),
                "side": side.name,
                "loss": side.loss,
                "setting": side.setting,
                "seconds": round(value, 5),
                "products_seconds": round(floor, 5),
                "over_products": round(value / floor, 3),
                "over_ours_same_loss": round(value / ours_at[side.loss], 3) if side.loss else "",
                "over_ours_taid": round(value / ours_at["taid"], 3),
                "peak_mib": round(peak / 2**20, 1),
                "above_gradients_mib": round((peak - returned) / 2**20, 1) if side.loss else "",
                "float32_accumulator_mib": round(accumulator / 2**20, 1),
                "gradient_difference": float(f"{differences[side]:.1e}") if side.loss else "",
                "repeats": repeats,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "peer": _version(side.name),
            }
        )
        del rows[-1]["compared"]
    return rows


def _difference(got: object, want: object) -> float:
    """The largest difference between two sides' gradients, as a share of the largest entry."""
    assert isinstance(got, tuple)
    assert isinstance(want, tuple)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def _version(side: str) -> str:
    package = {"trl": "trl", "liger": "liger-kernel"}.get(side.split("_")[0])
    try:
        return f"{package} {version(package)}" if package else ""
    except PackageNotFoundError:
        return package or ""


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def show(rows: list[dict[str, object]]) -> None:
    first = rows[0]
    print(
        f"\n{first['tokens']} tokens × {first['vocabulary']:,}, {first['student_width']} and {first['teacher_width']} "
        f"wide, {first['dtype']}, {first['device']}"
    )
    print("loss        side             seconds  /products  /ours same loss  /ours taid  peak MiB  above gradients")
    for r in rows:
        print(
            f"{r['loss']:11} {r['side']:15} {r['seconds']:8.4f} {r['over_products']:10.2f} "
            f"{r['over_ours_same_loss']:>16} {r['over_ours_taid']:11.2f} {r['peak_mib']:9.0f} "
            f"{r['above_gradients_mib']:>16}  {r['setting']}",
            flush=True,
        )


def sweep(repeats: int) -> None:
    """Prints the time of our TAID over the bare products for several chunk sizes."""
    case = Case(CPU_SHAPES[0])
    sizes = [2**power for power in range(23, 30)]
    times: dict[int, list[float]] = {0: [], **{size: [] for size in sizes}}
    for _ in range(repeats + 1):  # the first round is the warm-up
        for size, taken in times.items():
            run = case.products if not size else lambda size=size: case.ours("taid", chunk_bytes=size)
            taken.append(seconds(run))
    median = {size: statistics.median(taken[1:]) for size, taken in times.items()}
    for size in sizes:
        print(f"{size >> 20:4} MiB: {median[size] / median[0]:.2f} times the bare products")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--alone", action="store_true", help="measure our sides and the bare products alone")
    parser.add_argument("--sweep", action="store_true", help="compare chunk sizes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.sweep:
        sweep(options.repeats)
        return
    name = "cpu"
    if options.device == "cuda":
        name = "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name().lower())
    output = options.output or Path(__file__).parent / "results" / f"losses_{name}.csv"
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, object]] = []
    for shape in GPU_SHAPES if options.device == "cuda" else CPU_SHAPES:
        rows = measure(shape, options.repeats, options.device, alone=options.alone)
        results += rows
        show(rows)
        # After every shape: a run that is stopped leaves what it has measured.
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, results[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(results)


if __name__ == "__main__":
    main()
