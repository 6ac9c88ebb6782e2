"""On-policy steps: train on the student's own answers instead of the data's, drawn now or kept in a replay buffer."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image

from data.batch import SampleId, Step
from data.conversation import Conversation, Document, ImageSource
from data.encoding import Pair
from data.errors import BadSample, UserError
from data.loader import StepDataset, problem_of
from data.sample_images import load_images
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import FeatureTerm, Term
from vlm_distill.models.answers import Answer, Sampling
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import Teacher
from vlm_distill.runtime.processes import Processes

from .own_answers import OwnAnswers, Prompt
from .rollouts import Question, Rollouts
from .terms import acts_on
from .visual_advantage import VisualAdvantage

_FILE = "on_policy.json"
_DECODE_THREADS = 4


def check_on_policy(config: RunConfig, terms: Sequence[Term | FeatureTerm]) -> None:
    """Raise ``UserError`` if no loss can learn from on-policy steps, or there are no questions to answer."""
    if config.on_policy is None:
        return
    if all(term.answers == "data" for term in terms):
        raise UserError(
            "on_policy: every term has answers: data, so none learns from the student's own; give a term "
            "answers: own or both"
        )
    if not any(acts_on(term, drawn=True) for term in terms):
        names = ", ".join(term.name for term in terms if term.answers != "data")
        raise UserError(
            f"on_policy: the student's own answers have no right tokens, which {names} reads; "
            "add a loss that needs the teacher alone, such as jsd"
        )
    text = next((source.path for source in config.data.train if source.format == "text"), None)
    if text is not None:
        raise UserError(f"on_policy: {text} is plain text and has no questions; leave one of the two out")


class Drawn(NamedTuple):
    """A question with the tokens of its answer, and their log-probabilities when they were drawn."""

    prompt: Prompt
    ids: list[int]
    logprobs: Sequence[float]


class Kept(NamedTuple):
    """An answer in the replay buffer.

    Attributes:
        place: of its question.
        ids: the answer's tokens.
        version: the step before which the weights were taken that drew them.
        logprobs: the tokens' log-probabilities then; empty without ``importance``.
    """

    place: SampleId
    ids: list[int]
    version: int
    logprobs: Sequence[float] = ()


class OnPolicy:
    """Decides which steps learn from the student's own answers, and draws these (GKD, DistiLLM).

    With probability ``fraction`` a step is on-policy; that depends on (seed, step) alone, so that all ranks agree. In
    such a step the last answer of each conversation is drawn from the student as it is now, and the student is compared
    on it with those who teach the sample (Agarwal et al. 2024, arXiv 2306.13649). With ``replay``, the latest answers
    of all ranks are kept; once the buffer is full, a growing share of the on-policy steps takes its answers from there.
    With ``adaptive``, the fraction rises whenever an evaluation is no better than the one before (Ko et al. 2024,
    arXiv 2402.03898). With ``pairs``, an on-policy step also has the data's answers to the same questions: each
    micro-batch is followed by its twin with drawn answers (Ko et al. 2025, arXiv 2503.07067).

    An answer's random numbers depend on (seed, step, source, line). Up to rounding, neither the number of ranks nor
    the batch in which it is drawn changes it. With ``rollouts``, a server draws the answers, by older weights of the
    student; each kept answer remembers by which.

    Args:
        config: the run, with a section ``on_policy``.
        dataset: this rank's steps.
        student: the student in training.
        teacher: the teacher that it is compared with, or several.
        load: decodes an image.
        processes: the ranks.
        steps: optimizer steps of the run.
        lower_is_better: whether a better evaluation has a lower score.
        rollouts: draws the answers on a server; ``None``: the student here draws them.

    Attributes:
        fraction: probability that a step is on-policy.
        score: of the last evaluation.
        kept: the replay buffer: the latest answers; the same on every rank.
        counts: this rank's counts of the last prepared step, to be summed over ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: StepDataset,
        student: VisionLanguageModel,
        teacher: Teacher,
        load: Callable[[ImageSource], Image.Image],
        processes: Processes,
        steps: int,
        lower_is_better: bool,
        rollouts: Rollouts | None = None,
    ) -> None:
        assert config.on_policy is not None
        self.settings, self.seed, self.on_bad = config.on_policy, config.training.seed, config.data.bad_samples
        self.dataset, self.student, self.load, self.processes, self.steps = dataset, student, load, processes, steps
        self.lower_is_better, self.rollouts = lower_is_better, rollouts
        self.own_answers = OwnAnswers(dataset.collator, student, teacher)
        if self.settings.importance is not None:
            self._check_drawn_tokens()
        section, self.advantage = self.settings.visual_advantage, None
        if section is not None:
            if dataset.collator.grouped:
                raise UserError(
                    "on_policy.visual_advantage: needs a student with the teacher's tokenizer; leave it out"
                )
            self.advantage = VisualAdvantage(section, teacher, processes)
        # At stage 0 bf16 is autocast, which evaluation does without; drawing answers takes most of a step's time.
        self._mixed = config.training.dtype == "bf16" and config.deepspeed.stage == 0
        self.fraction = self.settings.fraction
        self.score: float | None = None
        self.kept: list[Kept] = []
        self.counts: dict[str, float] = {}

    def _check_drawn_tokens(self) -> None:
        """Raise ``UserError`` if answers are learnt in other tokens than the student draws."""
        collator, sources = self.dataset.collator, self.dataset.mixture.sources
        by_source = [collator.collators_of(number).values() for number in range(len(sources))]
        if any(one.grouped for one in chain.from_iterable(by_source)):
            raise UserError("on_policy.importance: needs a student with the teacher's tokenizer; leave it out")

    def prepare_step(self, step: Step) -> Step:
        """Return the step with the data's answers or with the student's; every rank calls this."""
        began = time.monotonic()
        self._drop_stale(step.index)
        kind = self._kind(step.index)
        prepared, answers = step, list[list[int]]()
        if kind == "draw":
            drawn = self._draw(step)
            prepared, answers = self._step(step, drawn), [answer.ids for answer in chain.from_iterable(drawn)]
            self._keep(drawn, self._version(step.index))
            if self.settings.pairs:
                prepared = _paired(step, prepared)
        elif kind == "replay":
            stream = self._random(step.index, "replay")
            entries = stream.sample(self.kept, len(self.dataset.mixture.samples_of(step.index)))
            replayed = [self._replay(step, part) for part in self.dataset.split.micro_batches(entries)]
            prepared = self._step(step, replayed)
        self.counts = {
            "on_policy": float(kind != "data"),
            "replayed": float(kind == "replay"),
            "answers": len(answers),
            "answer_tokens": sum(map(len, answers)),
            "answering": time.monotonic() - began if kind != "data" else 0.0,
            "advantage": self.advantage.total if self.advantage is not None and kind == "draw" else 0.0,
            "staleness": float(step.index - self._version(step.index)) if kind == "draw" else 0.0,
        }
        return prepared

    def weight_factor(self, term: Term | FeatureTerm, step: int) -> float:
        """Return the factor on a term's weight in an optimizer step: 1, or with ``balance: gradual`` DistiLLM-2's.

        It is b = 1 + min(1, 2 · step / steps) / 2 for terms on own answers, and 2 − b for terms on the data's
        (Ko et al. 2025, arXiv 2503.07067).
        """
        if self.settings.balance == "even" or term.answers == "both":
            return 1.0
        own = 1.0 + 0.5 * min(1.0, 2.0 * step / self.steps)
        return own if term.answers == "own" else 2.0 - own

    def metrics(self, totals: Mapping[str, float], seconds: float) -> dict[str, float]:
        """Return a step's metrics from the sums of :attr:`counts` over ranks."""
        world, answers = self.processes.world, totals["answers"]
        metrics = {
            "on_policy/step": totals["on_policy"] / world,
            "on_policy/fraction": self.fraction,
            "on_policy/tokens": totals["answer_tokens"],
            "on_policy/length": totals["answer_tokens"] / answers if answers else 0.0,
            "on_policy/time": totals["answering"] / world / seconds,
        }
        if self.advantage is not None and answers:
            metrics["on_policy/visual_advantage"] = totals["advantage"] / answers
        if self.rollouts is not None and totals["on_policy"]:
            metrics["on_policy/staleness"] = totals["staleness"] / world
        if self.settings.replay:
            metrics["on_policy/replayed"] = totals["replayed"] / world
        return metrics

    def after_evaluation(self, score: float | None) -> None:
        """Raise the fraction if an evaluation is no better than the one before. The first rank has the score."""
        score = self.processes.gather(score)[0]
        if self.settings.adaptive is None or score is None:
            return
        if self.score is not None and (score >= self.score if self.lower_is_better else score <= self.score):
            self.fraction = min(1.0, self.fraction + self.settings.adaptive)
        self.score = score

    def save(self, folder: Path) -> None:
        """Write the state that a resumed run needs into a checkpoint; every rank calls this."""
        if self.processes.first:
            kept = [[*entry.place, *entry[1:]] for entry in self.kept]
            state = {"fraction": self.fraction, "score": self.score, "kept": kept}
            (folder / _FILE).write_text(json.dumps(state), "utf-8")

    def restore(self, folder: Path) -> None:
        """Read the state from a checkpoint. Raise ``UserError`` if it has none."""
        path = folder / _FILE
        if not path.is_file():
            raise UserError(
                f"{folder} was written by a run without on_policy; leave the section out, or choose another output"
            )
        state = json.loads(path.read_text("utf-8"))
        self.score = state["score"]
        if self.settings.adaptive is not None:
            self.fraction = state["fraction"]
        self.kept = [Kept((source, row), *rest) for source, row, *rest in state["kept"]]

    def _random(self, *key: object) -> random.Random:
        # A string seed is hashed by SHA-512, the same in every process and Python version.
        return random.Random(" ".join(map(str, (self.seed, *key))))

    def _kind(self, step: int) -> str:
        """Return where a step's answers come from: ``data``, ``draw`` or ``replay``."""
        number, fraction = self._random(step).random(), self.fraction
        full = self.settings.replay is not None and len(self.kept) >= self.settings.replay
        if number < (fraction * (1 - step / self.steps) if full else fraction):
            return "draw"
        return "replay" if full and number < fraction else "data"

    def _step(self, step: Step, drawn: Sequence[Sequence[Drawn]]) -> Step:
        """Return the step with these questions and answers, given by micro-batch."""
        batches, degraded, tokens = [], [], 0
        for part in drawn:
            pairs, worse, logprobs = [], [], list[float]()
            for answer in part:
                try:
                    pair = self.own_answers.pair(answer.prompt, answer.ids)
                    known = [] if self.settings.importance is None else _logprobs_in(pair, answer)
                    if self.advantage is not None:
                        (asked,) = answer.prompt.asked.values()
                        worse.append(self.advantage.without_images(asked.seen, pair))
                    logprobs += known
                    pairs.append(pair)
                except BadSample as bad:
                    self._leave_out(step, answer.prompt.place, bad, "skip")  # the data is not at fault
            batch = self.dataset.collator.batch(pairs)
            seen = [pair.seen for pair in pairs if pair.seen is not None]
            batch = replace(batch, drawn=True, conversations=seen)
            if self.settings.importance is not None:
                batch = replace(batch, drawn_logprobs=torch.tensor(logprobs))
            batches.append(batch)
            degraded.append(worse)
            tokens += sum(len(pair.student.input_ids) for pair in pairs)
        if self.advantage is not None:
            self.processes.watch.phase(f"step {step.index + 1}, weighing answers")
            weights = self.advantage.weights(batches, degraded)
            batches = [replace(batch, answer_weights=own) for batch, own in zip(batches, weights, strict=True)]
        return replace(step, batches=batches, tokens=tokens, conversations=[])

    def _draw(self, step: Step) -> list[list[Drawn]]:
        """Return the step's own questions by micro-batch, with answers drawn now."""
        self.processes.watch.phase(f"step {step.index + 1}, drawing answers")
        prompts = []
        for part in self.dataset.split.micro_batches(self.dataset.mixture.samples_of(step.index)):
            asked = self._prompts(step, self._usable(step, part))
            prompts.append([prompt for prompt in asked if prompt is not None])
        answers = iter(self._answers(step.index, list(chain.from_iterable(prompts))))
        drawn = []
        for questions in prompts:
            answered: list[Drawn] = []
            for prompt in questions:
                answer = next(answers)
                if isinstance(answer, BadSample):
                    self._leave_out(step, prompt.place, answer, "skip")  # the data is not at fault
                else:
                    answered.append(Drawn(prompt, answer.token_ids, answer.logprobs))
            drawn.append(answered)
        return drawn

    def _version(self, step: int) -> int:
        """Return the step before which the weights were taken that draw a step's answers."""
        if self.rollouts is None:
            return step
        assert self.rollouts.version is not None
        return self.rollouts.version

    def _drop_stale(self, step: int) -> None:
        """Drop kept answers that were drawn by weights too old to learn from."""
        section = self.settings.server
        if section is not None and section.max_staleness is not None:
            oldest = step - section.max_staleness
            self.kept = [entry for entry in self.kept if entry.version >= oldest]

    def _usable(self, step: Step, places: Sequence[SampleId]) -> list[SampleId]:
        """Return the places without the step's bad samples."""
        sources = self.dataset.mixture.sources
        bad = {(problem.source, problem.line) for problem in step.problems}
        return [(source, row) for source, row in places if (sources[source].name, sources[source].line(row)) not in bad]

    def _answers(self, step: int, prompts: Sequence[Prompt]) -> Sequence[Answer | BadSample]:
        """Draw the student's answers to this rank's questions."""
        if self.rollouts is not None:
            self.rollouts.prepare(step)
            questions = []
            for prompt in prompts:
                seed = f"{self.seed} {step} {prompt.conversation.source} {prompt.conversation.line}"
                questions.append(Question(prompt.conversation, prompt.images, prompt.student, seed))
            self.processes.watch.phase(f"step {step + 1}, drawing answers")
            return self.rollouts.draw(questions)
        size = self.settings.batch_size
        # The same number of calls on every rank: under ZeRO-3 they answer together.
        split = self.dataset.split
        calls = math.ceil(split.accumulation * split.micro_batch_size / size)
        answers: list[Answer] = []
        for call in range(calls):
            asked = prompts[call * size : (call + 1) * size]
            lines = [f"{prompt.conversation.source} {prompt.conversation.line}" for prompt in asked]
            sampling = Sampling(self.settings.temperature, [self._random(step, line) for line in lines])
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self._mixed):
                answers += self.student.answer(
                    [prompt.student for prompt in asked],
                    max_new_tokens=self.settings.max_new_tokens,
                    sampling=sampling,
                )
        return answers

    def _replay(self, step: Step, entries: Sequence[Kept]) -> list[Drawn]:
        """Return earlier answers with their questions, which are read again."""
        prompts = self._prompts(step, [entry.place for entry in entries])
        found = []
        for prompt, entry in zip(prompts, entries, strict=True):
            if prompt is not None:
                found.append(Drawn(prompt, entry.ids, entry.logprobs))
        return found

    def _prompts(self, step: Step, places: Sequence[SampleId]) -> list[Prompt | None]:
        """Return the questions at some places, their images decoded by threads; ``None`` for what is left out."""
        found: list[Prompt | None] = []
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            read = [self._read(source, row, pool) for source, row in places]
            for place, question in zip(places, read, strict=True):
                try:
                    found.append(self.own_answers.ask(place, *question()))
                except BadSample as bad:
                    self._leave_out(step, place, bad)
                    found.append(None)
        return found

    def _read(
        self, source: int, row: int, pool: ThreadPoolExecutor
    ) -> Callable[[], tuple[Conversation, list[Image.Image]]]:
        """Start to read a sample. Return a function that gives it and its question's images or raises ``BadSample``."""
        try:
            sample = self.dataset.mixture.sources[source][row]
            assert not isinstance(sample, Document)
            question = sample.before_last_answer()
        except BadSample as error:
            bad = error  # Python deletes `error` at the end of the clause

            def fail() -> tuple[Conversation, list[Image.Image]]:
                raise bad

            return fail
        return pool.submit(self._load, sample, question).result

    def _load(self, sample: Conversation, question: Conversation) -> tuple[Conversation, list[Image.Image]]:
        """Return a sample whose question shows its videos as frames, and the question's images."""
        shown, images = load_images(question, self.load)
        rest = sample.messages[len(question.messages) :]
        sources = (*shown.images, *sample.images[len(question.images) :])
        return replace(sample, messages=(*shown.messages, *rest), images=sources), images

    def _keep(self, drawn: Sequence[Sequence[Drawn]], version: int) -> None:
        """Add all ranks' answers to the buffer, in the order that one rank would have."""
        if self.settings.replay is None:
            return
        mine = []
        for part in drawn:
            entries = []
            for prompt, ids, logprobs in part:
                needed = () if self.settings.importance is None else logprobs
                entries.append(Kept(prompt.place, ids, version, needed))
            mine.append(entries)
        # A step deals its micro-batches to the ranks in turn.
        for parts in zip(*self.processes.gather(mine), strict=True):
            self.kept += chain.from_iterable(parts)
        del self.kept[: -self.settings.replay]

    def _leave_out(
        self, step: Step, place: SampleId, bad: BadSample, on_bad: Literal["skip", "fail"] | None = None
    ) -> None:
        """Note that a sample is left out of the step."""
        source, row = place
        step.problems.append(problem_of(self.dataset.mixture.sources[source], row, bad, on_bad or self.on_bad))


def _logprobs_in(pair: Pair, answer: Drawn) -> Sequence[float]:
    """Return the log-probabilities of the answer's tokens that a pair has. Raise ``BadSample`` if it has others."""
    ids = pair.student.input_ids[pair.student_tokens].tolist()
    if ids != answer.ids[: len(ids)]:  # a teacher that is sent text needs the answer's text encoded again
        raise BadSample("own answer is encoded in other tokens than it was drawn in")
    return answer.logprobs[: len(ids)]


def _paired(data: Step, own: Step) -> Step:
    """Return the step with the data's answers and the student's own, micro-batch by micro-batch."""
    batches = chain.from_iterable(zip(data.batches, own.batches, strict=True))
    return replace(own, batches=list(batches), tokens=data.tokens + own.tokens)
