"""The plan of a run, as tables for a terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vlm_distill.planning import Plan
from vlm_distill.planning.memory import MOST, Memory

from .plots import duration


def write_plan(found: Plan, path: Path) -> Path:
    """Write a plan as JSON. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    return path


def render(found: Plan, console: Console) -> None:
    """Print a plan as tables."""
    # Parameters and samples.
    table = Table("", "part", "parameters", "trained", title="Parameters", title_justify="left")
    for part in found.parts:
        table.add_row(part.model, part.name, f"{part.parameters:,}", f"{part.trained:,}")
    console.print(table)
    s = found.sequences
    if s is not None:
        seen = f"{s.sampled} samples" if s.sampled else "data not found: every row is assumed to be full"
        console.print(
            f"tokens of a sample: mean {s.mean:,.0f}, p95 {s.p95:,}, longest {s.longest:,}; "
            f"supervised {s.supervised:,.0f}; images {s.images:.1f} ({seen})"
        )

    # Memory, and what the plan assumes.
    _memory(found, console)
    for remark in found.remarks:
        console.print(remark)

    # The whole training.
    flops, prefix = _scaled(found.flops, ("k", "M", "G", "T", "P", "E"))
    length = f"{found.steps:,} steps × {found.batch_size} samples: {flops} {prefix}FLOPs/step"
    if s is not None:
        read = f"{_bytes(found.bytes_read)} read" if found.bytes_read else "bytes read unknown (data not found)"
        tokens, thousands = _scaled(found.tokens, (" k", " M", " B", " T"))
        length += f", {tokens}{thousands} tokens, {read}"
    console.print(length)
    if found.seconds is not None and found.tokens_per_second is not None:
        console.print(
            f"{found.gpus} × {found.device} at {found.utilisation:.0%} of its peak: {duration(found.seconds)}, "
            f"{found.gpu_hours:,.2f} GPU-hours, {found.tokens_per_second:,.0f} tokens/s"
        )


def _memory(found: Plan, console: Console) -> None:
    """Print the memory of a rank by ZeRO stage and placement of the teacher."""
    own = found.memory[found.configured]
    unit, scale = ("GB", 1e9) if own.peak >= 1e9 else ("MB", 1e6)
    table = Table(
        *("ZeRO", "placement", "weights", "Adam", "grads", "teacher", "buckets", "activ.", "peak", "fits"),
        title=f"{unit} per rank at micro-batch {own.micro_batch}, {found.gpus} rank(s)",
        title_justify="left",
        caption="* as configured; placement: of the teacher; peak: at one moment, not the sum; fits: the largest "
        "micro-batch that fits",
        caption_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for i, row in enumerate(found.memory):
        sizes = (row.parameters, row.optimizer, row.gradients, row.teacher, row.buckets, row.activations, row.peak)
        mark = "*" if i == found.configured else ""
        table.add_row(f"{row.stage}{mark}", row.placement, *(f"{size / scale:.2f}" for size in sizes), _fits(row))
    console.print(table)
    limit, left = _bytes(found.budget), found.allowance
    reserved = f" ({_bytes(left)} kept free for CUDA and fragmentation)" if left else ""
    console.print(
        f"as configured: {_bytes(own.peak)} of {limit}{reserved}; largest micro-batch that fits: {_fits(own)}"
    )
    if own.host:
        console.print(f"main memory, as configured: {_bytes(own.host)} per rank")


def _fits(row: Memory) -> str:
    if row.largest_micro_batch >= MOST:
        return f"≥ {MOST}"
    return str(row.largest_micro_batch or "none")


def _scaled(value: float, prefixes: Sequence[str]) -> tuple[str, str]:
    """Return a number with three digits, and the prefix that it is in: ``14.1`` and ``P`` for 1.41e16."""
    prefix = ""
    for larger in prefixes:
        if value < 999.5:
            break
        value, prefix = value / 1000, larger
    return f"{value:.3g}", prefix


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.2f} MB"
