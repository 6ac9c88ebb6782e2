"""Hooks by which the two trainers, of VLMs and of classifiers, plug into the loop, in the order of its calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from data.batch import Problem, Step
from vlm_distill.losses import FeatureTerm, Term, TermSums
from vlm_distill.runtime.tracking import Tracker

from .engine import Engine
from .intake import FirstSamples


class Hooks(ABC):
    """What a path sets and answers; :class:`~vlm_distill.training.loop.Loop` calls it.

    1. Once, before the first step: ``mistake_in``, ``evaluation_mistake`` and ``remarks_on`` judge the first samples;
       ``introduce`` says more about the run.
    2. In every step: ``batches`` yields it, ``step_context`` surrounds the rest, ``prepare_step`` may replace its
       samples, ``local_counts`` and ``term_rows`` count it, ``lr`` and ``weight_factor`` set its learning rate and
       weights, ``forward_batch`` runs each micro-batch, ``after_update`` follows the update (``skip_step`` if there was
       nothing to learn from), and ``step_metrics`` adds to its metrics. If the step fails, ``describe_batch`` and
       ``locate_samples`` say where.
    3. At a checkpoint: ``share_statistics``, then ``save_more``; on resume ``load_more``.
    4. At an evaluation: ``share_statistics``, then ``evaluate``; for a new best student ``student_state`` and
       ``write_student``.
    5. At the end: an evaluation, ``student_state``, ``write_student``, ``final_summary``.

    Attributes:
        engine, student, terms: what is trained.
        dataset: this rank's steps; its ``mixture`` has the sources.
        steps, epoch_steps: optimizer steps of the run and of an epoch; the latter may be a fraction.
        evaluate_every: steps between evaluations; ``None``: only at the end.
        parameters: their numbers, by ``student``, ``trained`` and, with a teacher, ``teacher``.
        compared_by: what two scores must share to be compared, such as their data; ``None`` to keep no best student.
        lower_is_better: whether the best student has the lowest score, not the highest.
        remarks: on what was found while building.
    """

    #: The command that starts such a run, and the metric of its speed.
    command: ClassVar[str]
    speed: ClassVar[str]
    #: Where a user can look at every sample, for messages about bad ones.
    sample_hint: ClassVar[str] = ""

    engine: Engine
    student: nn.Module
    terms: Sequence[Term | FeatureTerm]
    dataset: Any
    steps: int
    epoch_steps: float
    parameters: dict[str, int]
    evaluate_every: int | None = None
    compared_by: Mapping[str, Any] | None = None
    lower_is_better: bool = False
    remarks: Sequence[str] = ()

    # Hooks: what a step learns from.

    @abstractmethod
    def batches(self, start: int, stop: int) -> Generator[Step]:
        """Yield this rank's share of the steps ``start`` to ``stop - 1``."""

    def prepare_step(self, step: Step) -> Step:
        """Prepare a step before its tokens are counted; on-policy training replaces answers. Called on every rank."""
        return step

    def step_context(self) -> AbstractContextManager[object]:
        """Return a context manager that the loop keeps open while it takes a step."""
        return nullcontext()

    @abstractmethod
    def locate_samples(self, step: Step, number: int) -> str:
        """Return where the samples of this rank's micro-batch ``number`` come from, for messages."""

    @abstractmethod
    def describe_batch(self, micro: Any) -> str:
        """Return the size of a micro-batch in words."""

    @abstractmethod
    def local_counts(self, step: Step) -> dict[str, float]:
        """Return this rank's counts, summed over ranks before the first forward; ``samples`` is one of them."""

    @abstractmethod
    def term_rows(self, term: Term | FeatureTerm, totals: Mapping[str, float]) -> float:
        """Return how many rows a term has in a step with these totals."""

    def weight_factor(self, term: Term | FeatureTerm, step: int) -> float:
        """Return the factor on a term's weight in an optimizer step."""
        return 1.0

    @abstractmethod
    def forward_batch(self, step: Step, micro: Any, scales: Mapping[str, float]) -> tuple[Tensor, dict[str, TermSums]]:
        """Run the engine's forward on a micro-batch. Return the scaled loss, and the sums of each term."""

    @abstractmethod
    def lr(self, step: int) -> float:
        """Return the learning rate of an optimizer step."""

    def skip_step(self, step: Step) -> None:
        """Called instead of an update, for a step in which no rank has anything to learn from."""

    def after_update(self, step: int) -> None:
        """Called after the weights were updated in optimizer step ``step``, counted from 0."""

    @abstractmethod
    def step_metrics(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Return a step's metrics beside losses and time; the last is its speed, under the name ``speed``."""

    # Hooks: what is said, evaluated and written.

    def mistake_in(self, found: FirstSamples) -> str | None:
        """Return why nothing can be learned from the usable samples; called on the first rank."""
        return None

    def evaluation_mistake(self) -> str | None:
        """Return why the run could not be evaluated, naming data that cannot be used; called on the first rank."""
        return None

    def remarks_on(self, found: FirstSamples) -> list[str]:
        """Return warnings about the first samples, beside those left out; called on the first rank."""
        return []

    def introduce(self, tracker: Tracker, done: int) -> None:
        """Say more about the run before its first step."""

    @abstractmethod
    def evaluate(self, done: int, tracker: Tracker, *, final: bool) -> tuple[float | None, list[Problem]]:
        """Evaluate the student, at the end with its teacher.

        Returns:
            On the first rank the score that chooses the best student, and samples that could not be read.
        """

    def share_statistics(self) -> None:
        """Average the ranks' batch-norm statistics, before they are saved or used."""
        self.engine.share_statistics(self.engine.task)

    def student_state(self) -> dict[str, Tensor]:
        """Return the student's full, unsharded state dict on the CPU; only the first rank receives it. Collective."""
        return self.engine.whole_state(self.student)

    @abstractmethod
    def write_student(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the student with these weights; called on the first rank."""

    def save_more(self, folder: Path) -> None:
        """Write into a checkpoint what the engine does not know of."""

    def load_more(self, folder: Path) -> None:
        """Restore what :meth:`save_more` wrote."""

    def final_summary(self) -> dict[str, Any]:
        """Return further entries of ``summary.json``."""
        return {}
