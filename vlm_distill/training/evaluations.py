"""Evaluation of a run on data sources and benchmarks: on a share of them during training, on all of them at its end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from data.batch import Problem
from data.collate import Collator
from data.conversation import Conversation, Document, ImageSource
from data.errors import BadSample, UserError
from data.images import load_image
from data.loader import problem_of
from data.plain_text import TextSource
from data.sample_images import load_images
from data.sources import Source
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.fields import Measure
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.answering import Asking, evaluate
from vlm_distill.evaluation.benchmark_lookup import data_folder, entry_name, get_benchmark
from vlm_distill.evaluation.benchmark_run import OpenBenchmark, open_benchmarks, run_benchmark
from vlm_distill.evaluation.benchmark_scores import published, score_answers
from vlm_distill.evaluation.held_out import OF_ANSWERS, add_to_scores, measure, measured_in_words
from vlm_distill.evaluation.kept_answers import TEACHER, AnswerFolder, digest_of, teacher_folder, teacher_name
from vlm_distill.evaluation.left_out import reasons
from vlm_distill.evaluation.predictions import Prediction
from vlm_distill.evaluation.question_source import Questions, evenly_spaced, share
from vlm_distill.evaluation.source_scores import answer_measures, mean_rouge_l, notes_on, summarise
from vlm_distill.models.fingerprint import fingerprint
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher
from vlm_distill.runtime.processes import Processes
from vlm_distill.runtime.tracking import Tracker

from .checkpoint import completed
from .intake import FIRST_SAMPLES
from .open_data import image_loader, open_sources, turns

_LOWER_IS_BETTER = {"perplexity", "kl"}


class Evaluations:
    """Evaluates student and teacher on everything that a run names, which is opened before a model is loaded.

    Call :meth:`prepare` once with the models, then :meth:`run` as often as needed; every rank does both.

    Args:
        config: the run.
        processes: the ranks.

    Attributes:
        remarks: on the benchmarks' files.
        best, measure: the source or benchmark by which the best student is chosen, and which of a source's measures.
        scores: main scores by benchmark and model (``student``, ``teacher``, or ``teacher_NAME`` of several), after the
            final evaluation, on the first rank.

    Raises:
        UserError: a source or benchmark cannot be read or scored, two have the same name, or ``best`` names none.
    """

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self.settings, self.processes = config.evaluation, processes
        self.folder = Path(config.output)
        self.config, self.micro = config, split_batch(config, processes.world)[0]
        settings, data = config.evaluation, config.data
        self.sources = open_sources(data.eval, data.max_length, "data.eval")
        opened = open_benchmarks(settings.benchmarks, settings.benchmark_data, settings.rules)
        if opened.failures:
            lacking = "; ".join(f"{name}: {reason}" for name, reason in opened.failures.items())
            raise UserError(f"evaluation.benchmarks: {lacking}; or leave them out (evaluation.benchmarks=[])")
        self.benchmarks, self.remarks = opened.ready, opened.warnings
        named = [get_benchmark(name).name for name in settings.benchmarks]
        # `vlm-distill score` finds them by these names.
        self.entries = dict(zip(named, map(entry_name, settings.benchmarks), strict=True))
        names = [source.name for source in self.sources] + named
        for name, count in Counter(names).items():
            if count > 1:
                raise UserError(f"evaluation: {count} things to evaluate on are called {name}; leave one out or rename")
        self._check_measures()
        self.best, self.measure = self._best_of(names)
        self.load_image = image_loader(data)
        roots = [Path(root) for root in data.roots]
        if roots:  # images of benchmarks are beside the benchmarks
            roots.append(data_folder(settings.benchmark_data))
        # VLMEvalKit and lmms-eval drop transparency.
        self.load_benchmark_image = partial(load_image, roots=roots, max_pixels=data.max_pixels, alpha="drop")
        self.scores: dict[str, dict[str, float | None]] = {}
        self.speeds: dict[str, dict[str, float]] = {}

    def _check_measures(self) -> None:
        """Raise ``UserError`` if nothing can be measured on a source."""
        measures = self.settings.measures
        for source in self.sources:
            if isinstance(source, TextSource) and set(measures) <= OF_ANSWERS:
                raise UserError(
                    f"evaluation.measures: {source.name} is plain text and gets no answers; name perplexity or kl"
                )

    def _best_of(self, names: Sequence[str]) -> tuple[str | None, Measure]:
        """Return the name by which the best student is chosen, and the measure if it is a source's."""
        best, wanted = self.settings.best, "exact"
        given = {name: get_benchmark(name).name for name in self.settings.benchmarks}
        best = best if best is None else given.get(best, best)
        if best is not None and best not in names and best.rpartition("/")[2] in get_args(Measure):
            best, _, wanted = best.rpartition("/")
        source = next((source for source in self.sources if source.name == best), None)
        if source is not None:
            text = isinstance(source, TextSource)
            measured = [m for m in self.settings.measures if not (text and m in OF_ANSWERS)]
            if wanted not in measured:
                choices = ", ".join(f"{best}/{m}" for m in measured)
                raise UserError(f"evaluation.best: {wanted} of {best} is not measured; choose from {choices}")
        elif wanted != "exact":
            best = self.settings.best
        if best is not None and best not in names:
            raise UserError(f"evaluation.best: {best} is not evaluated; choose from {', '.join(names)}")
        for benchmark in self.benchmarks:
            questions = benchmark.questions
            if benchmark.name == best and not any(published(questions.row(i)) for i in range(len(questions))):
                raise UserError(f"evaluation.best: the right answers of {best} are not published; choose another")
        return best, next(m for m in get_args(Measure) if m == wanted)

    def prepare(self, student: VisionLanguageModel, teacher: Teacher | None) -> None:
        """Take the models, after ``check_evaluations``. A teacher that does not run here is not evaluated."""
        data = self.config.data
        found = {} if teacher is None else teacher.models
        self.student, self.teachers = student, {teacher_folder(name): model for name, model in found.items()}
        self.kl_teacher = teacher if "kl" in self.settings.measures else None
        beside = None if self.kl_teacher is None else self.teachers[TEACHER].processor
        self.collators = {"student": Collator(student.processor, beside, data.max_length, turns(data))}
        for who, model in self.teachers.items():
            self.collators[who] = Collator(model.processor, None, data.max_length, turns(data))

    def mistake(self) -> str | None:
        """Return which source or benchmark has no usable question, and why; ``None`` if each has one.

        A source is tried until a question can be used, which is usually the first.
        """
        sources: list[tuple[str, Any, Callable[[ImageSource], Image.Image]]]
        sources = [("data.eval", source, self.load_image) for source in self.sources]
        sources += [("evaluation.benchmarks", b.questions, self.load_benchmark_image) for b in self.benchmarks]
        for key, source, load in sources:
            problems = self._unusable(source, load)
            if problems:
                return f"{key}: nothing of {source.name} can be asked: {reasons(problems)}"
        return None

    def _unusable(self, source: Any, load: Callable[[ImageSource], Image.Image]) -> list[Problem]:
        """Return the problems of some questions of a source; none if one of them can be used."""
        problems = []
        for index in evenly_spaced(len(source), FIRST_SAMPLES):
            try:
                sample = source[index]
                if isinstance(sample, Document):
                    self.collators["student"].encode(sample)
                else:
                    prompt, images = load_images(sample.prompt(), load)
                    self.student.processor.encode(prompt, images, generation=True)
                return []
            except BadSample as bad:
                problems.append(problem_of(source, index, bad, "skip"))
        return problems

    @property
    def compared_by(self) -> dict[str, Any]:
        """Return what two scores must have in common to be compared: name, rules, number of questions and measure."""
        of_benchmark = any(benchmark.name == self.best for benchmark in self.benchmarks)
        rules = self.settings.rules if of_benchmark else None
        measured = {"measure": self.measure} if self.measure != "exact" else {}
        return {"name": self.best, "rules": rules, "limit": self.settings.limit} | measured

    @property
    def lower_is_better(self) -> bool:
        """Whether the best student has the lowest score."""
        return self.measure in _LOWER_IS_BETTER

    def run(
        self, done: int, tracker: Tracker, began: float, *, final: bool = False
    ) -> tuple[float | None, list[Problem]]:
        """Evaluate the student on a share of everything, or at the end on all of it, together with its teachers.

        Args:
            done: optimizer steps taken.
            tracker: for metrics and messages.
            began: start of the run, by ``time.monotonic``.
            final: whether the run ends.

        Returns:
            On the first rank the score by which the best student is chosen, always of the same questions, and the
            samples that could not be used.
        """
        chosen: float | None = None
        problems: list[Problem] = []
        models = {"student": self.student}
        if final and self.settings.teacher:
            models |= self.teachers
        self.identities = {}
        if final:
            for who, model in models.items():
                self.identities[who] = self._identity(who, model.processor.chat_template, done)

        def report(who: str, name: str, values: dict[str, Any], words: str, *, answered_before: bool) -> None:
            if final and not answered_before and "answers_per_second" in values:
                self.speeds.setdefault(name, {})[who] = values["answers_per_second"]
            if who == "student" and values["n"]:
                tracker.log("eval", done, {"data": name, **values, "seconds": time.monotonic() - began})
            subject = f"step {done}" if who == "student" else who
            tracker.say(f"{subject}: {name}: {words}")

        for source in self.sources:
            for who, model in models.items():
                before = (self.folder / "evaluation" / source.name / who).exists()
                values, score = self._measure_source(model, source, who, problems, final=final)
                report(who, source.name, values, measured_in_words(values), answered_before=before)
                if (who, source.name) == ("student", self.best):
                    chosen = score
        for benchmark in self.benchmarks:
            for who, model in models.items():
                before = (self.folder / "evaluation" / benchmark.name / who).exists()
                found = self._ask_benchmark(model, benchmark, who, problems, final=final)
                if found is None:
                    continue
                predictions, values, words = found
                report(who, benchmark.name, values, words, answered_before=before)
                if final:
                    self.scores.setdefault(benchmark.name, {})[who] = values.get("score")
                if (who, benchmark.name) == ("student", self.best):
                    chosen = self._benchmark_score(benchmark, predictions)
        return chosen if chosen is None or math.isfinite(chosen) else None, problems

    def _benchmark_score(self, benchmark: OpenBenchmark, predictions: Iterable[Prediction]) -> float | None:
        """Return the score by which the best student is chosen."""
        asked = self._share(benchmark.questions, predictions)
        result, _ = score_answers(benchmark.entry, benchmark.questions, asked, self.settings.rules)
        return None if result.scores is None else result.scores.main

    def _share(self, questions: Questions, predictions: Iterable[Prediction]) -> list[Prediction]:
        """Return the predictions on the questions that are asked during training, to compare all scores of a run."""
        asked = set(share(questions, self.settings.limit))
        return [p for p in predictions if p.index in asked]

    def _limit(self, *, final: bool) -> int | None:
        """Return how many questions are asked of each source and benchmark; ``None``: all of them."""
        return None if final and not self.config.training.smoke else self.settings.limit

    def _asking(self, load: Callable[[ImageSource], Image.Image], *, final: bool) -> Asking:
        """Return how questions are asked: a share of them during training, all at the end."""
        return Asking(
            batch_size=self.settings.batch_size,
            max_new_tokens=self.settings.max_new_tokens,
            limit=self._limit(final=final),
            load=load,
        )

    def _answer_folder(
        self, name: str, who: str, about: dict[str, Any], *, final: bool, pictures: bool = False
    ) -> AnswerFolder | None:
        """Return where answers are kept; ``None`` during training, when nothing is written."""
        if not final:
            return None
        folder = self.folder / "evaluation" / name
        return AnswerFolder(
            folder / who,
            f"{self.folder.name}_{who}",
            self.identities[who],
            about,
            folder / "pictures" if pictures else None,
        )

    def _identity(self, who: str, template: Any, done: int) -> dict[str, Any]:
        """Return everything that the answers of this student or teacher depend on, to recognise kept ones."""
        name, data = teacher_name(who), self.config.data
        identity: dict[str, Any] = {"dtype": self.config.training.dtype, "chat_template": digest_of(template)}
        # Limits decide which images can be read.
        identity |= {"roots": list(data.roots), "max_pixels": data.max_pixels}
        if data.video is not None:
            identity["video"] = data.video.model_dump()
        if name is not None:
            section = self.config.all_teachers[name or "teacher"]
            prints = fingerprint(section.path) if section.path else {}
            return {**identity, "teacher": section.model_dump(exclude={"view"}), "files": prints}
        # The weights are those of the checkpoint that precedes every evaluation. Only the first rank may see it.
        found = completed(self.folder / "checkpoints") if self.processes.first else []
        latest = found[-1][1] if found else self.folder
        files = sorted(latest.rglob("*")) if found else []
        states = [[str(path.relative_to(latest)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return {**identity, "step": done, "checkpoint": digest_of(self.processes.gather(states)[0])}

    def _measure_source(
        self,
        model: VisionLanguageModel,
        source: Source | TextSource,
        who: str,
        problems: list[Problem],
        *,
        final: bool,
    ) -> tuple[dict[str, Any], float | None]:
        """Return everything measured on a source, and the score by which the best student is chosen."""
        measures, values, score = self.settings.measures, dict[str, Any](), None
        is_best = (who, source.name) == ("student", self.best)
        if not isinstance(source, TextSource) and OF_ANSWERS & set(measures):
            values, asked = self._ask_source(model, source, who, problems, final=final)
            if is_best and self.measure in OF_ANSWERS:
                of_share = self._share(source, asked)
                score = mean_rouge_l(of_share) if self.measure == "rouge_l" else summarise(of_share)["exact"]
        if not set(measures) <= OF_ANSWERS:
            limit = self._limit(final=final)
            found = self._predict(model, source, who, limit, problems)
            values |= found
            if is_best and self.lower_is_better:
                # Scores of a run are compared on the share that is measured during training.
                if limit != self.settings.limit:
                    found = self._predict(model, source, who, self.settings.limit, [])
                score = found.get(self.measure)
        if final and self.processes.first and list(measures) != ["exact"]:
            add_to_scores(self.folder / "evaluation" / source.name / who, measures, values)
        return values, score

    def _ask_source(
        self, model: VisionLanguageModel, source: Source, who: str, problems: list[Problem], *, final: bool
    ) -> tuple[dict[str, Any], list[Prediction]]:
        """Have a source's questions answered. Return the measures of the answers, and the predictions."""
        began = time.monotonic()
        wanted = turns(self.config.data)
        skipped = list[Problem]()
        about = {"source": source.name, "name": f"{self.folder.name}_{who}"}
        limited = wanted.max_prompt is not None or wanted.max_response is not None
        predictions = evaluate(
            model,
            _Fitting(source, self.collators["student"]) if limited else source,
            self._asking(self.load_image, final=final),
            ranks=self.processes.share,
            folder=self._answer_folder(source.name, who, about, final=final),
            skipped=skipped,
        )
        problems += skipped
        rate = len(predictions) / max(1e-9, time.monotonic() - began)
        values = answer_measures(predictions, skipped, len(source), self.settings.measures)
        return {**values, "answers_per_second": rate}, predictions

    def _predict(
        self,
        model: VisionLanguageModel,
        source: Source | TextSource,
        who: str,
        limit: int | None,
        problems: list[Problem],
    ) -> dict[str, Any]:
        """Return perplexity and, for the student, KL from the teacher."""
        found = measure(
            model,
            self.kl_teacher if who == "student" else None,
            source,
            self.collators[who],
            batch_size=self.micro,
            limit=limit,
            ranks=self.processes.share,
            load=self.load_image,
            skipped=problems,
        )
        return found.values(self.settings.measures)

    def _ask_benchmark(
        self,
        model: VisionLanguageModel,
        benchmark: OpenBenchmark,
        who: str,
        problems: list[Problem],
        *,
        final: bool,
    ) -> tuple[list[Prediction], dict[str, Any], str] | None:
        """Have a benchmark answered and scored. Return predictions, values and words on the first rank."""
        began = time.monotonic()
        entry = benchmark.entry
        data = str(data_folder(self.settings.benchmark_data).resolve())
        about = {"entry": self.entries[entry.name], "data": data}
        result = run_benchmark(
            model,
            benchmark,
            self._asking(self.load_benchmark_image, final=final),
            ranks=self.processes.share,
            folder=self._answer_folder(entry.name, who, about, final=final, pictures=True),
        )
        if result is None:
            return None
        problems += result.skipped
        values: dict[str, Any] = {"n": result.n, "answers_per_second": result.n / max(1e-9, time.monotonic() - began)}
        values["cut"] = result.cut
        if result.limited:
            values["limited_from"] = result.questions
        # A failure of scoring does not end the run.
        if result.failure is not None:
            return [], {"n": 0}, f"not scored: {result.failure}"
        if result.scores is None:
            return result.predictions, values, f"{result.n:,} answers; the right ones are not published"
        if not math.isfinite(result.scores.main):
            return result.predictions, values, "no question could be scored"
        values["score"] = result.scores.main
        total = f" of {result.out_of:g}" if result.out_of != 100 else ""
        words = f"{entry.metric} {result.scores.main:.2f}{total} on {result.n:,} questions"
        return result.predictions, values, words + "".join(f", {note}" for note in notes_on(values))


class _Fitting:
    """The questions of a source that training would use: text-only conversations that are too long are left out."""

    def __init__(self, source: Source, collator: Collator) -> None:
        self.source, self.collator, self.name = source, collator, source.name

    def __len__(self) -> int:
        return len(self.source)

    def size(self, index: int) -> int:
        return self.source.size(index)

    def line(self, index: int) -> int:
        return self.source.line(index)

    def __getitem__(self, index: int) -> Conversation:
        conversation = self.source[index]
        if not conversation.images:
            try:
                self.collator.encode(conversation)
            except BadSample as bad:
                if bad.reason == "too long":
                    raise
        return conversation
