"""The scores that a model card shows: of a run's own evaluation, and of folders that evaluations wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_distill.evaluation.compare import Metric, mean_interval
from vlm_distill.evaluation.predictions import Prediction

from .run_folder import load_run


@dataclass(frozen=True)
class CardScore:
    """A student's score on one data set.

    Attributes:
        data: the data's name.
        kind: the hub's name of the metric.
        metric: the metric in words.
        value: as in ``scores.json``.
        interval: 95 %; ``None`` if unknown.
        n: number of questions or images.
        rules: whose rules scored a benchmark.
        teacher: the teacher's score; ``None`` if it was not evaluated.
        percent: whether the value is a share in 0…1.
    """

    data: str
    kind: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    n: int
    rules: str = ""
    teacher: float | None = None
    percent: bool = False

    def shown(self, value: float | None) -> str:
        """Return a value of this score as text."""
        if value is None:
            return ""
        return f"{value:.2%}" if self.percent else f"{value:.2f}"

    def row(self) -> list[str]:
        """Return the cells of a table: data, metric, student, interval, teacher, number, rules."""
        low, high = self.interval or (None, None)
        interval = "" if self.interval is None else f"{self.shown(low)} to {self.shown(high)}"
        values = [self.shown(self.value), interval, self.shown(self.teacher)]
        return [self.data, self.metric, *values, f"{self.n:,}", self.rules]


#: Measures in ``scores.json``: the hub's name of the metric, and the metric in words. All but the last two are shares.
_MEASURES = {
    "exact": ("accuracy", "exact match"),
    "soft": ("accuracy", "VQA accuracy"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "perplexity": ("perplexity", "perplexity"),
    "kl": ("kl_divergence", "KL to the teacher, nats a token"),
}
_OF_CLASSIFIERS = {
    "exact": ("accuracy", "top-1"),
    "top5": ("accuracy", "top-5"),
    "ece": ("ece", "calibration error (ECE)"),
}
_NOT_SHARES = {"perplexity", "kl"}


def card_scores(run: Path, evaluations: Sequence[Path] = ()) -> list[CardScore]:
    """Return a student's scores, by data and metric.

    Args:
        run: its run's folder.
        evaluations: further folders that ``vlm-distill eval`` or ``vision.evaluate`` wrote; their scores of the same
            data replace the run's.

    Raises:
        UserError: a folder holds no evaluation, or a file is damaged.
    """
    found: dict[str, list[CardScore]] = {}
    for folder in (run, *evaluations) if (run / "config.yaml").is_file() else evaluations:
        loaded = load_run(folder, folder.name, "")
        for (data, who), scores in loaded.scores.items():
            if who == "student":
                teacher = loaded.scores.get((data, "teacher"), {})
                found[data] = list(_scores_of(data, scores, teacher, loaded.predictions[data, who]))
    return [score for data in sorted(found) for score in found[data]]


def _scores_of(
    data: str, scores: Mapping[str, Any], teacher: Mapping[str, Any], predictions: Sequence[Prediction]
) -> Iterator[CardScore]:
    n = int(scores.get("n") or 0)
    if scores.get("main") is not None:
        yield _main_score(data, scores, teacher, predictions)
        return
    measures = _OF_CLASSIFIERS if scores.get("kind") == "classification" else _MEASURES
    for key, (kind, words) in measures.items():
        if scores.get(key) is not None:
            interval = _interval(key, scores, predictions)
            share = key not in _NOT_SHARES
            yield CardScore(data, kind, words, scores[key], interval, n, "", teacher.get(key), share)


def _main_score(
    data: str, scores: Mapping[str, Any], teacher: Mapping[str, Any], predictions: Sequence[Prediction]
) -> CardScore:
    """Return a benchmark's main score; its interval is known if the score is the mean over questions."""
    interval = None
    scored = [p.score for p in predictions if p.score is not None]
    if scored and abs(100 * sum(scored) / len(scored) - scores["main"]) < 0.01:
        interval = _bootstrapped(predictions, "score", 100.0)
    rules = str(scores.get("rules", ""))
    metric = str(scores.get("metric", "score"))
    return CardScore(data, "accuracy", metric, scores["main"], interval, int(scores["n"]), rules, teacher.get("main"))


def _interval(key: str, scores: Mapping[str, Any], predictions: Sequence[Prediction]) -> tuple[float, float] | None:
    if key == "exact" and scores.get("interval") is not None:
        low, high = scores["interval"]
        return low, high
    metrics: dict[str, Metric] = {"exact": "exact", "soft": "soft"}
    return _bootstrapped(predictions, metrics[key]) if key in metrics and predictions else None


def _bootstrapped(predictions: Sequence[Prediction], metric: Metric, scale: float = 1.0) -> tuple[float, float] | None:
    """Return a mean's interval; ``None`` if all questions scored the same: a bootstrap finds no spread among these."""
    low, high = mean_interval(predictions, metric)
    return None if low == high else (scale * low, scale * high)
