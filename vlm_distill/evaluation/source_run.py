"""Ask and measure a model on a data source, and write the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.batch import Problem
from data.collate import Collator
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher
from vlm_distill.runtime.rank_share import RankShare

from .answering import Asking, Feedback, evaluate
from .held_out import OF_ANSWERS, add_to_scores, measure
from .kept_answers import AnswerFolder
from .source_scores import answer_measures, summarise


@dataclass(frozen=True)
class Measuring:
    """What to measure on data sources.

    Attributes:
        measures: among ``exact``, ``rouge_l``, ``perplexity`` and ``kl``.
        collator: for perplexity and kl, of the model and the teacher.
        teacher: the model that kl is measured from.
    """

    measures: Sequence[str]
    collator: Collator
    teacher: Teacher | None = None


@dataclass
class SourceResult:
    """What was measured on one source.

    Attributes:
        values: every measure by name, ``n``, and what limits them.
        by_type: exact match and VQA accuracy by question type.
        skipped: samples left out; the same one may occur twice.
    """

    values: dict[str, Any] = field(default_factory=dict)
    by_type: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[Problem] = field(default_factory=list)


def run_source(
    model: VisionLanguageModel,
    source: Any,
    measuring: Measuring,
    asking: Asking,
    *,
    ranks: RankShare,
    folder: AnswerFolder,
    feedback: Feedback = Feedback(),  # noqa: B008 - frozen
) -> SourceResult:
    """Measure a model on a source, and write what was measured into ``folder``; every rank makes the same call."""
    measures = measuring.measures
    result = SourceResult()
    if OF_ANSWERS & set(measures):
        predictions = evaluate(
            model, source, asking, ranks=ranks, folder=folder, skipped=result.skipped, feedback=feedback
        )
        result.values = answer_measures(predictions, result.skipped, len(source), measures)
        result.by_type = summarise(predictions)["by_type"]
    if not set(measures) <= OF_ANSWERS:
        found = measure(
            model,
            measuring.teacher,
            source,
            measuring.collator,
            limit=asking.limit,
            ranks=ranks,
            load=asking.load,
            skipped=result.skipped,
        )
        result.values |= found.values(measures)
    if ranks.first and list(measures) != ["exact"]:
        add_to_scores(folder.path, measures, result.values)
    return result
