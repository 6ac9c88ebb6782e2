"""What ``vlm-distill plan`` found, as tables for a terminal and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vlm_distill.planning import Plan
from vlm_distill.planning.memory import MOST, Memory

from .plots import duration


def write_plan(found: Plan, path: Path) -> Path:
    """Writes a plan as JSON, and returns where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found.as_dict(), indent=1) + "\n")
    return path


def render(found: Plan, console: Console) -> None:
    """The plan as tables."""
    table = Table("", "part", "parameters", "trained", title="Parameters", title_justify="left")
    for part in found.parts:
        table.add_row(part.model, part.name, f"{part.parameters:,}", f"{part.trained:,}")
    console.print(table)
    s = found.sequences
    seen = f"{s.sampled} samples" if s.sampled else "no data found: every row is taken to be full"
    console.print(
        f"tokens of a sample: mean {s.mean:,.0f}, p95 {s.p95:,}, longest {s.longest:,}; "
        f"supervised {s.supervised:,.0f}; images {s.images:.1f} ({seen})"
    )
    _memory(found, console)
    for remark in found.remarks:
        console.print(remark)
    console.print(
        f"{found.steps:,} steps of {found.batch_size}: {found.flops:.3g} FLOPs a step, {found.tokens:,.0f} tokens, "
        f"{_bytes(found.bytes_read) if found.bytes_read else 'nobody knows how many bytes'} read"
    )
    if found.seconds is not None and found.tokens_per_second is not None:
        console.print(
            f"{found.gpus} × {found.device} at {found.utilisation:.0%} of its peak: {duration(found.seconds)}, "
            f"{found.gpu_hours:,.2f} GPU-hours, {found.tokens_per_second:,.0f} tokens a second"
        )


def _memory(found: Plan, console: Console) -> None:
    own = found.memory[found.configured]
    unit, scale = ("GB", 1e9) if own.peak >= 1e9 else ("MB", 1e6)
    table = Table(
        *("ZeRO", "placement", "weights", "Adam", "grads", "teacher", "buckets", "activ.", "peak", "fits"),
        title=f"{unit} a rank at micro-batch {own.micro_batch}, {found.gpus} rank(s)",
        title_justify="left",
        caption="* as configured; placement: the teacher's; peak: of one moment, not the sum; fits: the largest "
        "micro-batch that does",
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
    beside = f", of which {_bytes(left)} are left free for what is no tensor" if left else ""
    console.print(
        f"as configured {_bytes(own.peak)} of {limit}{beside}; the largest micro-batch that fits: {_fits(own)}"
    )
    if own.host:
        console.print(f"and in main memory, as configured, {_bytes(own.host)} a rank")


def _fits(row: Memory) -> str:
    if row.largest_micro_batch >= MOST:
        return f"≥ {MOST}"
    return str(row.largest_micro_batch or "none")


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.2f} MB"
