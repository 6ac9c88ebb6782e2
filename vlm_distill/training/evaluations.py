"""A run's evaluations, on data sources and benchmarks: shares of them while it trains, and all of them at its end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape

from data.batch import Problem
from data.errors import UserError
from data.images import load_image
from data.sources import Source
from vlm_distill.config import RunConfig
from vlm_distill.evaluation.benchmark import Benchmark
from vlm_distill.evaluation.benchmark_run import (
    CannotScore,
    answered,
    judged,
    open_benchmarks,
    published,
    run_benchmark,
)
from vlm_distill.evaluation.benchmarks import data_folder
from vlm_distill.evaluation.questions import BenchmarkQuestions
from vlm_distill.evaluation.runner import Prediction, Questions, evaluate, in_words, share, summarise
from vlm_distill.models.interface import VisionLanguageModel

from .build import image_loader, open_sources
from .engine import Processes
from .tracking import Tracker


class Evaluations:
    """Everything that a run is evaluated on, opened before a model is loaded.

    Args:
        config: the run.
        processes: the ranks; every rank builds and runs this.

    Attributes:
        told: what is to be said about the benchmarks' files.
        scores: main scores by benchmark and ``student`` or ``teacher``, after the final evaluation, on the first rank.

    Raises:
        UserError: something cannot be read or scored, two things have one name, or ``best`` names nothing.
    """

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self.settings, self.processes = config.evaluation, processes
        self.folder = Path(config.output)
        settings, data = config.evaluation, config.data
        self.sources = open_sources(data.eval)
        self.benchmarks, self.told = open_benchmarks(settings.benchmarks, settings.benchmark_data, settings.rules)
        names = [source.name for source in self.sources] + [entry.name for entry, _ in self.benchmarks]
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"evaluation: {count} things to evaluate on are called {name}; leave one out or rename")
        self.best = self._best_of(names)
        self.load_image = image_loader(data)
        roots = [Path(root) for root in data.roots]
        if roots:  # images of benchmarks lie where the benchmarks do
            roots.append(data_folder(settings.benchmark_data))
        # As VLMEvalKit and lmms-eval decode images.
        self.load_benchmark_image = partial(load_image, roots=roots, max_pixels=data.max_pixels, alpha="drop")
        self.scores: dict[str, dict[str, float | None]] = {}

    def _best_of(self, names: Sequence[str]) -> str | None:
        """The name by which the best student is chosen."""
        best = self.settings.best
        given = dict(zip(self.settings.benchmarks, (entry.name for entry, _ in self.benchmarks), strict=True))
        best = best if best is None else given.get(best, best)
        if best is not None and best not in names:
            known = ", ".join(names) or "nothing is evaluated: name benchmarks, or data.eval"
            raise UserError(f"evaluation.best: {best} is not evaluated on; there is {known}")
        for entry, questions in self.benchmarks:
            if entry.name == best and not any(published(questions.row(i)) for i in range(len(questions))):
                raise UserError(f"evaluation.best: the right answers of {best} are not published; choose another")
        return best

    @property
    def compared_by(self) -> dict[str, Any]:
        """What makes two scores comparable: of what, by whose rules, on how many questions."""
        of_benchmark = any(entry.name == self.best for entry, _ in self.benchmarks)
        rules = self.settings.rules if of_benchmark else None
        return {"name": self.best, "rules": rules, "limit": self.settings.limit}

    def run(
        self,
        student: VisionLanguageModel,
        teacher: VisionLanguageModel | None,
        done: int,
        tracker: Tracker,
        began: float,
        *,
        final: bool = False,
    ) -> tuple[float | None, list[Problem]]:
        """The student's answers to everything; at the end of the run all of it, and the teacher's beside them.

        Args:
            teacher: is asked only at the end, where the settings want it.
            done: optimizer steps finished.
            began: when the run did, in seconds of the clock.

        Returns:
            On the first rank the score by which the best student is chosen, of the same questions each time, and the
            samples that could not be asked.
        """
        chosen: float | None = None
        problems: list[Problem] = []
        models = {"student": student}
        end = f"after step {done}" if final else None
        if final and teacher is not None and self.settings.teacher:
            models["teacher"] = teacher

        def tell(who: str, name: str, values: dict[str, Any], words: str) -> None:
            if who == "student" and values["n"]:
                tracker.log("eval", done, {"data": name, **values, "seconds": time.time() - began})
            tracker.say(f"{f'step {done}' if who == 'student' else who}: {escape(name)}: {words}")

        for source in self.sources:
            for who, model in models.items():
                predictions, values = self._ask_source(model, source, who, end, problems)
                tell(who, source.name, values, in_words(values))
                if (who, source.name) == ("student", self.best):
                    chosen = summarise(self._share(source, predictions))["exact"]
        for entry, questions in self.benchmarks:
            for who, model in models.items():
                found = self._ask_benchmark(model, entry, questions, who, end, problems)
                if found is None:
                    continue
                predictions, values, words = found
                tell(who, entry.name, values, words)
                if final:
                    self.scores.setdefault(entry.name, {})[who] = values.get("score")
                if (who, entry.name) == ("student", self.best):
                    rows = answered(questions, self._share(questions, predictions))
                    chosen = self._main(entry, rows)
        return chosen if chosen is None or math.isfinite(chosen) else None, problems

    def _main(self, entry: Benchmark, rows: list[dict[str, Any]]) -> float | None:
        try:
            return judged(entry, rows, self.settings.rules, None).main if rows else None
        except UserError:  # the whole can be scored and the share cannot
            return None

    def _share(self, questions: Questions, predictions: Iterable[Prediction]) -> list[Prediction]:
        """Those of the questions that are asked in training: what the end of the run is compared with is theirs."""
        asked = set(share(questions, self.settings.limit))
        return [p for p in predictions if p.index in asked]

    def _common(self, name: str, who: str, end: str | None) -> dict[str, Any]:
        """What ``evaluate`` and ``run_benchmark`` are told. Nothing is written before the end, which ``end`` names."""
        processes = self.processes
        return {
            "batch_size": self.settings.batch_size,
            "limit": self.settings.limit if end is None else None,
            "rank": processes.rank,
            "world": processes.world,
            "all_gather": processes.gather,
            "out": self.folder / "evaluation" / name / who if end is not None else None,
            "resume": f"{who} {end}" if end is not None else None,
        }

    def _ask_source(
        self, model: VisionLanguageModel, source: Source, who: str, end: str | None, problems: list[Problem]
    ) -> tuple[list[Prediction], dict[str, Any]]:
        began = time.time()
        predictions = evaluate(
            model,
            source,
            max_new_tokens=self.settings.max_new_tokens,
            load=self.load_image,
            skipped=problems,
            **self._common(source.name, who, end),
        )
        overall = summarise(predictions)
        rate = len(predictions) / max(1e-9, time.time() - began)
        values = {"exact": overall["exact"], "soft": overall["soft"], "n": overall["n"], "answers_per_second": rate}
        return predictions, values

    def _ask_benchmark(
        self,
        model: VisionLanguageModel,
        entry: Benchmark,
        questions: BenchmarkQuestions,
        who: str,
        end: str | None,
        problems: list[Problem],
    ) -> tuple[list[Prediction], dict[str, Any], str] | None:
        """Predictions, values and words, on the first rank."""
        began = time.time()
        try:
            result = run_benchmark(
                model,
                entry,
                questions,
                rules=self.settings.rules,
                name=f"{self.folder.name}_{who}",
                load=self.load_benchmark_image,
                pictures=self.folder / "evaluation" / entry.name / "pictures" if end is not None else None,
                **self._common(entry.name, who, end),
            )
        except CannotScore as error:  # no reason to lose a run
            return [], {"n": 0}, f"[bold red]not scored:[/] {escape(str(error).removeprefix(f'{entry.name}: '))}"
        if result is None:
            return None
        problems += result.skipped
        n = len(result.predictions)
        values: dict[str, Any] = {"n": n, "answers_per_second": n / max(1e-9, time.time() - began)}
        if result.scores is None:
            return result.predictions, values, f"{n:,} answers; the right ones are not published"
        if not math.isfinite(result.scores.main):
            return result.predictions, values, "no question could be scored"
        values["score"] = result.scores.main
        return result.predictions, values, f"{entry.metric} {result.scores.main:.2f} on {n:,} questions"
