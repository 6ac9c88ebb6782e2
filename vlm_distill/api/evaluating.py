"""Evaluation as one call: ``vlm_distill.evaluate``."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batch import Problem
from data.errors import UserError
from vlm_distill.cli.evaluation import RankEvalOptions
from vlm_distill.eval import Printed, answer
from vlm_distill.evaluation.answering import Feedback
from vlm_distill.evaluation.left_out import reasons

from .arguments import Arguments
from .surroundings import undisturbed

if TYPE_CHECKING:
    from vlm_distill.evaluation.benchmark_scores import Result
    from vlm_distill.evaluation.source_run import SourceResult


class Unprinted(Printed):
    """Shows nothing to a program that calls the evaluation, or a bar; warnings become Python's own."""

    def __init__(self, *, bar: bool) -> None:
        self._bar = bar

    def warn(self, text: str) -> None:
        warnings.warn_explicit(text, UserWarning, "vlm_distill", 0)

    def feedback(self, name: str) -> Feedback:
        return Feedback(_bar_of(name)) if self._bar else Feedback()

    def source(self, name: str, result: SourceResult, folder: Path) -> None:
        self.skipped(result.skipped)

    def skipped(self, problems: Sequence[Problem]) -> None:
        if problems:
            self.warn(f"{len(problems)} questions left out: {reasons(problems)}")

    def benchmarks(self, results: Sequence[Result], out: Path) -> None:
        pass

    def failures(self, found: Mapping[str, str]) -> None:
        if found:
            raise UserError("; ".join(f"{name}: {reason}" for name, reason in found.items()))


def _bar_of(name: str) -> Callable[[int, int], None]:
    """Return a function of (done, total) that moves a bar of tqdm's, which suits notebooks and terminals."""
    from tqdm.auto import tqdm

    bar = tqdm(desc=name, unit="answer")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _as_arguments(text: str) -> str:
    """Return a message with the command's options as arguments of Python: ``--max-bad`` is ``max_bad``."""
    return re.sub(r"--([a-z][a-z-]*)", lambda option: option[1].replace("-", "_"), text)


def evaluate(
    model: Any,
    benchmarks: str | Sequence[str] = (),
    data: Any = None,
    *,
    teacher: Any = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Answer questions with a model, and return the scores by benchmark or source.

    Args:
        model: a name, a folder, a run's folder, a model from ``load_vlm``, or a loaded model of Transformers with its
            processor, as ``(model, processor)``. A loaded one is left as it is.
        benchmarks: names, or YAML files.
        data: with benchmarks, the folder that holds their files. Without, questions with their answers: a path, a list
            of samples, a ``datasets.Dataset``, or a list of these.
        teacher: the model that the measure ``kl`` compares with; as ``model``.
        out: a folder for answers and scores, by which an interrupted evaluation continues; by default none is kept.
        progress: show a progress bar.
        options: those of ``vlm-distill eval``, such as ``rules``, ``limit``, ``batch_size``, ``max_new_tokens``,
            ``measures`` (a list, or names separated by commas), ``score`` (``"likelihood"``), ``images``, ``max_bad``.

    Returns:
        For a benchmark, what its ``scores.json`` holds: ``main`` is the main score, of a possible ``out_of``. For a
        source, its measures (``exact`` and ``soft`` are shares), ``n``, and the same ``by_type`` of question.

    Raises:
        UserError: a mistake in the arguments, or something has no valid score; the message is one line.
    """
    with Arguments() as arguments, tempfile.TemporaryDirectory() as scratch:
        section = arguments.model("model", model)
        given: dict[str, Any] = {"model": section["path"], "out": Path(scratch if out is None else out)}
        if teacher is not None:
            given["teacher"] = arguments.model("teacher", teacher)["path"]
        given["benchmarks"] = [benchmarks] if isinstance(benchmarks, str) else [os.fspath(name) for name in benchmarks]
        if data is not None:
            given["data"] = [source["path"] for source in arguments.sources("data", data)]
        shown = Unprinted(bar=progress)
        try:
            with undisturbed():
                scores, failures = answer(_options(given | options), shown)
            shown.failures(failures)
        except UserError as error:
            # Messages name the command's options, which are arguments here.
            raise UserError(_as_arguments(str(error))) from None
    return scores


def _options(given: dict[str, Any]) -> RankEvalOptions:
    """Return the command's options from the arguments of Python. Raise ``UserError`` for an unknown one."""
    known = {option.name: option for option in fields(RankEvalOptions)}
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UserError(f"evaluate: no argument {name!r}; {hint}")
    if not isinstance(given.get("measures", ""), str):
        given["measures"] = ",".join(given["measures"])
    if "images" in given:
        given["images"] = Path(given["images"])
    given["root"] = [Path(root) for root in given.get("root", ())]
    return RankEvalOptions(**given)
