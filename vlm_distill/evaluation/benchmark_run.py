"""Open benchmarks, ask a model their questions, and write the scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from data.batch import Problem
from data.errors import UserError
from vlm_distill.models.answers import Answer
from vlm_distill.models.processor import Processor, Prompt
from vlm_distill.runtime.rank_share import RankShare

from .answering import Answerer, Asking, Feedback, evaluate
from .benchmark_entry import Benchmark
from .benchmark_lookup import find_questions, get_benchmark
from .benchmark_questions import BenchmarkQuestions
from .benchmark_scores import YES_OR_NO, Result, check_questions, check_rules, score_answers, write_result
from .judge import Judge
from .kept_answers import AnswerFolder
from .pictures import write_pictures
from .predictions import Prediction
from .prompts import options
from .scoring.scores import Rules


class Chooser(Protocol):
    """What scoring by likelihood needs of a model (``VisionLanguageModel`` is one)."""

    @property
    def processor(self) -> Processor: ...
    def score_options(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]: ...


@dataclass(frozen=True)
class OpenBenchmark:
    """A benchmark whose files were found and checked.

    Attributes:
        entry: its settings.
        questions: put by the rules.
        rules: whose prompts and scores.
    """

    entry: Benchmark
    questions: BenchmarkQuestions
    rules: Rules

    @property
    def name(self) -> str:
        return self.entry.name


@dataclass(frozen=True)
class OpenBenchmarks:
    """Benchmarks that were opened together.

    Attributes:
        ready: those that can be asked.
        warnings: what to know about their files.
        failures: name and one-line reason for each benchmark whose files cannot be used.
    """

    ready: list[OpenBenchmark]
    warnings: list[str]
    failures: dict[str, str]


def open_benchmarks(
    names: Sequence[str],
    data: str | Path | None,
    rules: Rules,
    *,
    format: str | None = None,
    images: Path | None = None,
    limit: int | None = None,
    likelihood: bool = False,
) -> OpenBenchmarks:
    """Open benchmarks, and report those whose files cannot be used.

    Args:
        names, data, rules, format, images: as in :func:`~.benchmark_lookup.find_questions`.
        limit: as in :class:`~.answering.Asking`.
        likelihood: as in :func:`run_benchmark`.

    Raises:
        UserError: there is no such benchmark, or it has no such rules: mistakes of the command, not of a file.
    """
    entries = {entry.name: entry for entry in map(get_benchmark, names)}
    for entry in entries.values():
        check_rules(entry, rules)
    opened = OpenBenchmarks([], [], {})
    with collected_warnings(opened.warnings):
        for name, entry in entries.items():
            try:
                questions = find_questions(entry, data, rules=rules, format=format, images=images)
                check_questions(entry, questions, rules, limit=limit, likelihood=likelihood)
            except UserError as error:
                opened.failures[name] = str(error).removeprefix(f"{name}: ")
            else:
                opened.ready.append(OpenBenchmark(entry, questions, rules))
    return opened


@contextmanager
def collected_warnings(texts: list[str]) -> Iterator[None]:
    """Context manager: append the texts of warnings raised inside to ``texts`` instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    texts.extend(str(warning.message) for warning in caught)


@dataclass(frozen=True)
class LikeliestOption:
    """Answers with the likeliest option's letter, or the likelier of Yes and No; nothing is generated.

    Every question must have options (:func:`~.benchmark_scores.check_questions`).
    """

    model: Chooser
    entry: Benchmark

    @property
    def processor(self) -> Processor:
        return self.model.processor

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[Answer]:
        """Return the likeliest option for each prompt."""
        given = [list(options(conversation.metadata)) for conversation, _ in prompts]
        if self.entry.scorer in YES_OR_NO:
            given = [["Yes", "No"]] * len(prompts)
        answers = []
        for texts, likelihoods in zip(given, self.model.score_options(prompts, given), strict=True):
            best = max(range(len(texts)), key=lambda k: likelihoods[k])
            answers.append(Answer(texts[best], [], [likelihoods[best]]))
        return answers


def run_benchmark(
    model: Answerer,
    benchmark: OpenBenchmark,
    asking: Asking = Asking(),  # noqa: B008 - frozen
    *,
    judge: Judge | None = None,
    likelihood: bool = False,
    ranks: RankShare = RankShare(),  # noqa: B008 - frozen
    folder: AnswerFolder | None = None,
    feedback: Feedback = Feedback(),  # noqa: B008 - frozen
) -> Result | None:
    """Ask a benchmark's questions, score the answers and write both.

    Args:
        model: answers, as in :func:`~.answering.evaluate`; with ``likelihood``, also a :class:`Chooser`.
        benchmark: from :func:`open_benchmarks`.
        asking: as in ``evaluate``; a ``max_new_tokens`` replaces the benchmark's own.
        judge: decides what the rules leave to one.
        likelihood: choose the likeliest option instead of generating.
        ranks: as in ``evaluate``.
        folder: receives ``predictions.jsonl``, ``asked.json``, ``scores.json``, ``scores.csv`` and VLMEvalKit's
            prediction file; without it, nothing is written.
        feedback: as in ``evaluate``.

    Returns:
        On rank 0 the result, whose ``failure`` says why there are no scores; ``None`` on other ranks.
    """
    entry, questions, rules = benchmark.entry, benchmark.questions, benchmark.rules
    check_rules(entry, rules)
    results: list[Result] = []

    def finish(predictions: list[Prediction], skipped: list[Problem]) -> None:
        result, rows = score_answers(entry, questions, predictions, rules, judge, skipped)
        results.append(result)
        if folder is not None:
            write_result(folder.path, result, entry, rows, folder.model)
        if folder is not None and folder.pictures is not None:
            pictures = folder.pictures
            write_pictures(pictures, predictions, lambda row: questions[row].prompt().images[0], asking.load)

    if folder is not None:
        about = {**(folder.about or {}), "benchmark": entry.name, "rules": rules, "name": folder.model}
        identity = folder.identity
        if identity is not None:
            identity = {**identity, "answers": "likelihood" if likelihood else "generate"}
        folder = replace(folder, identity=identity, about=about)
    length = asking.max_new_tokens or entry.length_for(rules)
    evaluate(
        LikeliestOption(model, entry) if likelihood else model,  # type: ignore[arg-type]
        questions,
        replace(asking, max_new_tokens=length, references=False),
        ranks=ranks,
        folder=folder,
        feedback=feedback,
        finish=finish,
    )
    return results[0] if results else None
