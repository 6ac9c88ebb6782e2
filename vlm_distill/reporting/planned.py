"""The report's section that shows a run's plan beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import plots
from .entries import Run


def planned_sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each planned run, what it was planned for (``under``) and ``rows`` of label, plan and measurement."""
    sections = []
    for run in runs:
        plan = run.summary.get("plan")
        if isinstance(plan, Mapping) and plan.get("memory"):
            row = _row(plan)
            under = f"{plan['gpus']} × {plan['device']}, ZeRO {row['stage']}, micro-batch {row['micro_batch']}"
            sections.append({"run": run, "under": under, "rows": _rows(run, plan)})
    return sections


def _row(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    return plan["memory"][plan["configured"]]


def _rows(run: Run, plan: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows of texts, without those that were not measured."""
    summary = run.summary
    memory, on_cpu = summary.get("memory", {}).get("peak_bytes"), str(summary.get("device", "")).startswith("cpu")
    resident = "Peak memory of a rank" + (" (measured: the whole process)" if on_cpu else "")
    counted = sum(p["parameters"] for p in plan["parts"] if p["model"] == "student")
    rows = [
        ("Parameters, student", counted, summary.get("parameters", {}).get("student"), "{:,}".format),
        (resident, _row(plan)["peak"], memory, plots.size_in_bytes),
        ("Steps", plan["steps"], summary.get("steps"), "{:,}".format),
        ("FLOPs a step", plan["flops"], _median(run, "flops"), "{:.3g}".format),
        ("Tokens per second", plan["tokens_per_second"], _median(run, "tokens_per_second"), plots.compact),
        ("Share of the GPU's peak", plan["utilisation"], _median(run, "mfu"), plots.percent),
        ("Waiting for data", 0.0, _median(run, "waiting"), plots.percent),
        ("Time", plan["seconds"], summary.get("seconds"), plots.duration),
    ]
    return [
        (what, "–" if before is None else show(before), show(after))
        for what, before, after, show in rows
        if after is not None
    ]


def _median(run: Run, key: str) -> float | None:
    found = [line[key] for line in run.train if isinstance(line.get(key), int | float)]
    return statistics.median(found) if found else None
