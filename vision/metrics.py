"""Compute a classifier's scores from its logits.

A few numbers per image are kept and summed at the end, in the order of the source and exactly rounded (``math.fsum``):
scores depend neither on the batches nor on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_distill.evaluation.source_scores import wilson_interval

#: Guo et al. 2017, as most papers after it.
BINS = 15


@dataclass(frozen=True)
class Answers:
    """Answers to N images; every field is an array ``[N]``.

    Attributes:
        rows: int64, rows of the source.
        labels: int64, the source's labels.
        answers: int64, the output with the largest logit.
        confidence: float64, its softmax.
        right, right5: bool, whether it, or one of the five largest, is right. Ties are broken as by ``torch.topk``.
        nll: float64, ``−log`` of the summed softmax of the outputs that are right, in nats.
        agrees: bool, whether the teacher gives the same answer; empty without a teacher.
        divergence: float64, ``KL(teacher ‖ classifier)`` in nats; empty without a teacher.
    """

    rows: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    right5: np.ndarray
    nll: np.ndarray
    agrees: np.ndarray
    divergence: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def measure(
    rows: Sequence[int],
    labels: Sequence[int],
    logits: Tensor,
    right: Tensor,
    pair: tuple[Tensor, Tensor] | None = None,
) -> Answers:
    """Measure a batch.

    Args:
        rows, labels: of the source, N each.
        logits: ``[N, C]``, any floating type; the softmax is computed in float64.
        right: bool ``[N, C]``, which outputs are right: one in each row, or several (ReaL).
        pair: the classifier's and the teacher's logits ``[N, K]`` of the same K classes, to compare the two.
    """
    logits = logits.double()
    log_p = logits.log_softmax(-1)
    top = logits.topk(min(5, logits.shape[-1]), -1).indices
    hits = right.gather(-1, top)
    nothing = torch.empty(0)
    agrees, divergence = nothing.bool(), nothing.double()
    if pair is not None:
        ours, theirs = (x.double() for x in pair)
        agrees = ours.topk(1, -1).indices[:, 0] == theirs.topk(1, -1).indices[:, 0]
        log_q = theirs.log_softmax(-1)
        # A class without teacher probability adds nothing: 0 · ∞ is 0 here.
        divergence = torch.where(log_q.exp() > 0, log_q.exp() * (log_q - ours.log_softmax(-1)), 0).sum(-1)
    found = (
        top[:, 0],
        log_p.gather(-1, top[:, :1])[:, 0].exp(),
        hits[:, 0],
        hits.any(-1),
        -log_p.masked_fill(~right, -math.inf).logsumexp(-1),
        agrees,
        divergence,
    )
    return Answers(np.asarray(rows, np.int64), np.asarray(labels, np.int64), *(x.cpu().numpy() for x in found))


def together(parts: Sequence[Answers]) -> Answers:
    """Join the answers of all batches of all ranks, in the order of the source."""
    if not parts:
        parts = [measure([], [], torch.empty(0, 1), torch.empty(0, 1, dtype=torch.bool))]
    whole = {}
    for field in fields(Answers):
        whole[field.name] = np.concatenate([getattr(part, field.name) for part in parts])
    order = np.argsort(whole["rows"], kind="stable")
    return Answers(**{name: values[order] if len(values) else values for name, values in whole.items()})


def summarise(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """Compute the scores of N images, as in ``scores.json``.

    Args:
        names: of the source's classes, in the order of its labels.

    Returns:
        ``n``; ``exact`` (top-1) and ``top5``, shares in 0…1; ``interval``, Wilson's of top-1, 95 %; ``nll``, a mean in
        nats; ``ece`` and ``calibration`` (:func:`calibration`); ``by_type``, ``n`` and ``exact`` of each class that
        has an image, in the order of labels. With a teacher also ``agreement``, the share of equal answers, and ``kl``,
        the mean of KL(teacher ‖ classifier) in nats. Without an image, scores are ``None``.
    """
    n = len(answers)
    if n == 0:
        empty = dict.fromkeys(("exact", "top5", "interval", "nll", "ece"))
        return {"kind": "classification", "n": 0, **empty, "calibration": [], "by_type": {}}
    exact = int(answers.right.sum()) / n
    # A diverged classifier has no confidence.
    bins = calibration(answers.confidence, answers.right) if np.isfinite(answers.confidence).all() else []
    counts = np.bincount(answers.labels, minlength=len(names))
    hits = np.bincount(answers.labels[answers.right], minlength=len(names))
    scores: dict[str, Any] = {
        "kind": "classification",
        "n": n,
        "exact": exact,
        "top5": int(answers.right5.sum()) / n,
        "interval": list(wilson_interval(exact, n)),
        "nll": _mean(answers.nll),
        "ece": expected_calibration_error(bins) if bins else None,
        "calibration": bins,
        "by_type": {
            name: {"n": int(count), "exact": int(hit) / int(count)}
            for name, count, hit in zip(names, counts, hits, strict=True)
            if count
        },
    }
    if len(answers.agrees):
        scores["agreement"] = int(answers.agrees.sum()) / n
        scores["kl"] = _mean(answers.divergence)
    return scores


def _mean(values: np.ndarray) -> float | None:
    """Return the exactly rounded mean; ``None`` if a value is NaN or infinite, which JSON cannot hold."""
    return math.fsum(values) / len(values) if np.isfinite(values).all() else None


def calibration(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Compute accuracy by confidence (Guo et al. 2017, section 3).

    Images fall into 15 bins of equal width by the softmax of their answer: bin m of M = 15 is ((m − 1)/M, m/M].

    Returns:
        For each non-empty bin, in rising order: number of images ``n``, mean ``confidence`` and accuracy ``exact``.
    """
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for number in range(BINS):
        inside = place == number
        n = int(inside.sum())
        if n:
            sure = math.fsum(confidence[inside]) / n
            found.append({"n": n, "confidence": sure, "exact": int(right[inside].sum()) / n})
    return found


def expected_calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Compute ``ECE = Σ_m n_m/N · |exact_m − confidence_m|`` over the bins of :func:`calibration`, in 0…1."""
    total = math.fsum(b["n"] for b in bins)
    return math.fsum(b["n"] * abs(b["exact"] - b["confidence"]) for b in bins) / total
