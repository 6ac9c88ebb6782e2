"""Numbers of an optimizer step: means over all ranks, the check that they are finite, and the line beside the bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlm_distill.losses import FeatureTerm, Term, TermSums
from vlm_distill.runtime.processes import Processes

from .intake import SampleTally

_UNITS = {"tokens_per_second": "tok/s", "images_per_second": "images/s"}


def term_means(
    terms: Sequence[Term | FeatureTerm], sums: Sequence[Mapping[str, TermSums]], processes: Processes
) -> dict[str, dict[str, float]]:
    """Return the mean of every term's loss and signals over all rows of a step, with one all-reduce.

    Args:
        terms: the terms of the loss.
        sums: sums of each micro-batch of this rank, by the names of the terms.
        processes: the ranks.
    """
    names = {term.name: ["loss", *term.loss.signals] for term in terms}
    flat: list[float | Tensor] = []
    for term, keys in names.items():
        flat.append(sum(micro[term].count for micro in sums))
        for key in keys:
            flat.append(
                _added([micro[term].loss if key == "loss" else micro[term].signals.get(key, 0.0) for micro in sums])
            )
    totals = iter(processes.sum(flat))
    means: dict[str, dict[str, float]] = {}
    for term, keys in names.items():
        count = next(totals)
        # Every total is taken from the iterator, also where there were no rows.
        added = [next(totals) for _ in keys]
        means[term] = {key: value / count if count else 0.0 for key, value in zip(keys, added, strict=True)}
    return means


def _added(values: Sequence[float | Tensor]) -> float | Tensor:
    if len(values) == 1:
        return values[0]  # adding zero would cost a GPU two launches, which a small model's step notices
    return sum(value.double() if isinstance(value, Tensor) else value for value in values)


def not_finite_terms(means: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the names of the terms whose loss is NaN or infinite."""
    return [name for name, values in means.items() if not math.isfinite(values["loss"])]


def finite_norm(norm: float | None) -> bool:
    """Return whether a gradient's norm is finite; DeepSpeed reports some infinite norms as -1."""
    return norm is None or (math.isfinite(norm) and norm >= 0)


def headline(values: Mapping[str, Any], speed: str, tally: SampleTally) -> str:
    """Return what the progress bar shows of a step: ``loss 1.234  t 0.4  data wait 1.2%  10.3k tok/s``.

    Args:
        values: the step's metrics.
        speed: the metric of the run's speed, ``tokens_per_second`` for example.
        tally: samples left out and empty steps of the run so far.
    """
    shown = [f"loss {values['loss']:.4g}"] if "loss" in values else []
    shown += [f"{name.split('/')[1]} {value:.4g}" for name, value in values.items() if name.endswith("/t")]
    shown += [f"data wait {values['waiting']:.1%}", f"{_short(values[speed])} {_UNITS[speed]}"]
    if tally.left_out:
        shown.append(f"left out {tally.share:.1%}")
    if tally.empty_steps:
        shown.append(f"empty steps {tally.empty_steps:,}")
    return "  ".join(shown)


def _short(number: float) -> str:
    """Return a number with three digits: ``10.3k`` for 10,312."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
