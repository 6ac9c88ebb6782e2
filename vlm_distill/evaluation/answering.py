"""Ask a model every question of a source, on any number of ranks, and score its answers.

:func:`evaluate` is the loop that training, ``vlm-distill eval`` and ``vlm-distill generate`` share.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

from PIL import Image

from data.batch import Problem
from data.conversation import Conversation, ImageSource
from data.errors import BadSample
from data.images import load_image
from data.sample_images import load_images
from vlm_distill.models.answers import Answer
from vlm_distill.models.processor import Processor, Prompt
from vlm_distill.runtime.rank_share import RankShare

from .kept_answers import AnswerFolder, AnswerStore, Kept, kept_answer, matched, question_digest
from .predictions import Prediction, score_answer, score_kept
from .question_source import Questions, read_question, share
from .source_scores import write_answers

T = TypeVar("T")

#: Longest answer to a data source's questions, in tokens, unless another length is given.
SOURCE_LENGTH = 32
_DECODE_THREADS = 4
_BATCHES_AHEAD = 2


class Answerer(Protocol):
    """What evaluation needs of a model (``VisionLanguageModel`` is one)."""

    @property
    def processor(self) -> Processor: ...
    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> Sequence[Answer | BadSample]: ...


@dataclass(frozen=True)
class Asking:
    """How questions are put to a model.

    Attributes:
        batch_size: questions answered together.
        max_new_tokens: longest answer; by default the benchmark's own, or :data:`SOURCE_LENGTH` for other data.
        limit: ask only this many questions, evenly spaced over the source (:func:`~.question_source.share`).
        references: leave out questions without a right answer.
        load: decodes an image.
        at_once: batches in flight at once, by threads, where the model runs elsewhere: ranks then do not wait for each
            other, and a batch without a prompt is not sent. By default one batch after the other.
    """

    batch_size: int = 64
    max_new_tokens: int | None = None
    limit: int | None = None
    references: bool = True
    load: Callable[[ImageSource], Image.Image] = load_image
    at_once: int | None = None


@dataclass(frozen=True)
class Feedback:
    """What a person sees while questions are answered.

    Attributes:
        progress: called with (questions done on all ranks, questions in all) after each batch.
        tell: called on rank 0 with a line that says how many answers were kept from before, if any.
    """

    progress: Callable[[int, int], None] | None = None
    tell: Callable[[str], None] | None = None


@dataclass
class _Loaded:
    index: int
    conversation: Conversation
    images: list[Image.Image]
    asked: str = ""


#: What became of rows, by row number.
_Results = dict[int, "Prediction | Problem"]


def evaluate(
    model: Answerer,
    source: Questions,
    asking: Asking = Asking(),
    *,
    ranks: RankShare = RankShare(),  # noqa: B008 - frozen
    folder: AnswerFolder | None = None,
    skipped: list[Problem] | None = None,
    feedback: Feedback = Feedback(),
    finish: Callable[[list[Prediction], list[Problem]], None] | None = None,
) -> list[Prediction]:
    """Return greedy answers to every question, scored, in the order of the source.

    Batches are cut once from the source sorted by length and dealt to the ranks in turn, so neither their content nor
    an answer depends on the number of ranks. Every rank makes the same number of ``generate`` calls, each with at least
    one prompt: under ZeRO-3, ranks wait for each other inside them. Samples that cannot be read are left out of the
    scores and listed in ``skipped``.

    Args:
        model: answers batches of prompts.
        source: the questions with their right answers.
        asking: which questions, and how.
        ranks: this process's share. Every rank makes the same call.
        folder: receives ``predictions.jsonl`` and ``scores.json``, written by rank 0. With an identity, answers are
            kept there as they come, and an interrupted evaluation resumes from them, on any number of ranks, to the
            same predictions.
        skipped: receives the samples that were left out, from all ranks.
        feedback: what to show meanwhile.
        finish: called on rank 0 with all predictions and problems instead of writing the two files. If it raises, the
            answers kept so far stay.

    Returns:
        The whole list, on every rank.
    """
    asker = _Asker(model, source, asking)
    rows = sorted(share(source, asking.limit), key=lambda i: (source.size(i), i))
    store = None if folder is None else folder.store(asker.max_new_tokens, ranks.rank)

    # Rank 0 reads what is kept from before: the other ranks may run where its files are not visible.
    results = _recall(store, asker, rows, feedback) if store is not None and ranks.first else {}
    results = ranks.gather(results)[0]

    mine = ranks.deal(_open_batches(rows, asking.batch_size, results))
    made = _ask_batches(asker, mine, rows, store, len(results), ranks.world, feedback)

    # Every rank gets everything.
    for part in ranks.gather(made):
        results |= part
    by = "" if store is None else store.key
    predictions = [replace(found, by=by) for _, found in sorted(results.items()) if isinstance(found, Prediction)]
    problems = sorted((found for found in results.values() if isinstance(found, Problem)), key=lambda p: p.line)
    if skipped is not None:
        skipped += problems
    if ranks.first:
        _write(folder, store, rows, predictions, problems, _unusable(results), len(source), finish)
    return predictions


def _open_batches(rows: Sequence[int], size: int, results: _Results) -> list[list[int]]:
    """Return the rows without a result, in the batches that they would be in if there were none."""
    batches = []
    for start in range(0, len(rows), size):
        still_open = [row for row in rows[start : start + size] if row not in results]
        if still_open:
            batches.append(still_open)
    return batches


def _ask_batches(
    asker: _Asker,
    batches: Sequence[Sequence[int]],
    rows: Sequence[int],
    store: AnswerStore | None,
    before: int,
    world: int,
    feedback: Feedback,
) -> _Results:
    """Ask this rank's batches one after the other, and keep each batch's answers as soon as they are there."""
    made = _Results()
    if batches and asker.asking.at_once is None:
        asker.find_filler(rows)
    for done, found in enumerate(asker.ask_all(batches, digests=store is not None), start=1):
        made |= found
        if store is not None and found:
            store.add([_kept(p) for p in found.values() if isinstance(p, Prediction)], _unusable(found))
        if feedback.progress is not None:
            feedback.progress(min(before + done * world * asker.asking.batch_size, len(rows)), len(rows))
    return made


def _write(
    folder: AnswerFolder | None,
    store: AnswerStore | None,
    rows: Sequence[int],
    predictions: list[Prediction],
    problems: list[Problem],
    unusable: Sequence[int],
    questions: int,
    finish: Callable[[list[Prediction], list[Problem]], None] | None,
) -> None:
    """Write predictions and scores, and close the store; on rank 0."""
    if store is not None:
        # Before predictions.jsonl is replaced: the answers that a limit now leaves out may be in it.
        rows_now, questions_now = {*rows}, {prediction.asked for prediction in predictions}
        kept = store.answers()
        store.set_aside([k for k in kept if k.index not in rows_now and k.asked not in questions_now])
    if finish is not None:
        finish(predictions, problems)
    elif folder is not None:
        write_answers(folder.path, predictions, problems, questions=questions)
    if store is not None and folder is not None:
        store.finish(folder.about, unusable)


def _kept(prediction: Prediction) -> Kept:
    return kept_answer(asdict(prediction))


def _unusable(results: _Results) -> list[int]:
    return [row for row, found in results.items() if isinstance(found, Problem)]


def _recall(store: AnswerStore, asker: _Asker, rows: Sequence[int], feedback: Feedback) -> _Results:
    """Return what is known of rows without asking: kept answers, scored again, and rows that still cannot be asked."""
    kept = store.answers()
    unusable = store.unusable()
    if not kept and not unusable:
        return {}
    source = asker.source
    results: _Results = {}
    for row, answer in recalled(kept, source, rows, asker.asking.references).items():
        results[row] = score_kept(row, source[row], answer)
    if results and feedback.tell is not None:
        feedback.tell(f"{source.name}: {len(results):,} of {len(rows):,} answers kept from before in {store.folder}")
    for row in rows:
        if row in unusable and row not in results:
            found = asker.read(row)
            if isinstance(found, Problem):
                results[row] = found
    return results


def recalled(kept: Sequence[Kept], source: Questions, rows: Sequence[int], references: bool = True) -> dict[int, Kept]:
    """Return the kept answers to a source's current questions, by row."""

    def digest(row: int) -> str | None:
        found = read_question(source, row, references) if row < len(source) else None
        return question_digest(found) if isinstance(found, Conversation) else None

    return matched(kept, rows, digest)


@dataclass
class _Asker:
    """Reads a source's questions, and asks a model batch by batch.

    Attributes:
        filler: a question that the model can be asked. It keeps this rank in step with the others when its own batch is
            empty; the answer is thrown away. ``None`` where there is no such question, or where ranks do not wait.
    """

    model: Answerer
    source: Questions
    asking: Asking
    filler: _Loaded | None = field(default=None, init=False)

    @property
    def max_new_tokens(self) -> int:
        return self.asking.max_new_tokens or SOURCE_LENGTH

    def read(self, row: int) -> _Loaded | Problem:
        """Return a question that the model can be asked, or why it cannot."""
        conversation = read_question(self.source, row, self.asking.references)
        if isinstance(conversation, Problem):
            return conversation
        try:
            item = self._load(row, conversation)
            self._encode(item)
        except BadSample as bad:
            return Problem(self.source.name, conversation.line or row + 1, bad.reason, bad.detail)
        return item

    def find_filler(self, rows: Sequence[int]) -> None:
        """Take the first question of these rows that the model can be asked as the filler."""
        readable = (found for found in map(self.read, rows) if isinstance(found, _Loaded))
        self.filler = next(readable, None)

    def ask_all(self, batches: Sequence[Sequence[int]], *, digests: bool) -> Iterator[_Results]:
        """Yield what became of each batch: in order, or with several at once as they come back."""
        loaded = self._load_ahead(batches, digests=digests)
        at_once = self.asking.at_once
        if at_once is None:
            yield from (self._reply(*batch) for batch in loaded)
        else:
            yield from _concurrently(self._reply, loaded, at_once)

    def _load(self, index: int, conversation: Conversation, *, digest: bool = False) -> _Loaded:
        known = question_digest(conversation) if digest else ""
        prompt, images = load_images(conversation.prompt(), self.asking.load)
        # What is asked shows a video's frames; the answer that it is compared with stays.
        answer = conversation.messages[len(prompt.messages) :]
        shown = replace(conversation, messages=(*prompt.messages, *answer), images=prompt.images)
        return _Loaded(index, shown, images, known)

    def _encode(self, item: _Loaded) -> None:
        """Raise ``BadSample`` for a question that does not fit the model, exactly as ``generate`` would."""
        self.model.processor.encode(item.conversation.prompt(), item.images, generation=True)

    def _load_ahead(
        self, batches: Sequence[Sequence[int]], *, digests: bool
    ) -> Iterator[tuple[list[_Loaded], _Results]]:
        """Yield batches in order, while threads decode the images of the next ones. Rows are read in this thread."""
        Waiting = list[tuple[int, Conversation | Problem, Future[_Loaded] | None]]
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:

            def submit(batch: Sequence[int]) -> Waiting:
                waiting: Waiting = []
                for index in batch:
                    row = read_question(self.source, index, self.asking.references)
                    if isinstance(row, Problem):
                        waiting.append((index, row, None))
                    else:
                        waiting.append((index, row, pool.submit(self._load, index, row, digest=digests)))
                return waiting

            queue: deque[Waiting] = deque()
            upcoming = iter(batches)
            for _ in batches:
                while len(queue) <= _BATCHES_AHEAD and (batch := next(upcoming, None)) is not None:
                    queue.append(submit(batch))
                loaded, unusable = [], _Results()
                for index, row, item in queue.popleft():
                    if isinstance(row, Problem):
                        unusable[index] = row
                        continue
                    assert item is not None
                    try:
                        loaded.append(item.result())
                    except BadSample as bad:
                        unusable[index] = Problem(self.source.name, row.line or index + 1, bad.reason, bad.detail)
                yield loaded, unusable

    def _reply(self, loaded: list[_Loaded], unusable: _Results) -> _Results:
        """Return what became of one batch, including the rows that could not be read."""
        if self.asking.at_once is not None and loaded:
            return unusable | self._answer(loaded, loaded[0])
        if self.filler is not None:
            return unusable | self._answer(loaded, self.filler)
        return unusable | self._fitting(loaded)[1]  # nothing fits this model

    def _answer(self, loaded: Sequence[_Loaded], filler: _Loaded) -> _Results:
        """Return what became of one batch, from exactly one call of ``generate`` that reaches the model."""
        kept, results = list(loaded), _Results()

        def generated() -> Sequence[Answer | BadSample]:
            prompts = [(item.conversation, item.images) for item in kept or [filler]]
            return self.model.generate(prompts, max_new_tokens=self.max_new_tokens)

        try:
            answers = generated()
        except BadSample:
            # Prompts are encoded before the model's first forward, so the other ranks have not been left waiting: take
            # out those that do not fit this model and ask once more.
            kept, results = self._fitting(loaded)
            answers = generated()
        # If nothing was kept, the only answer is the filler's, and zip drops it.
        for item, answer in zip(kept, answers, strict=False):
            if isinstance(answer, BadSample):
                results[item.index] = _problem(item, answer)
                continue
            text = answer.text if answer.marked is None else answer.marked
            probability = math.exp(sum(answer.logprobs))
            results[item.index] = score_answer(
                item.index, item.conversation, text, probability, answer.complete, item.asked
            )
        return results

    def _fitting(self, loaded: Sequence[_Loaded]) -> tuple[list[_Loaded], _Results]:
        """Return the prompts that fit the model, and why the others do not."""
        kept, unfit = [], _Results()
        for item in loaded:
            try:
                self._encode(item)
                kept.append(item)
            except BadSample as bad:
                unfit[item.index] = _problem(item, bad)
        return kept, unfit


def _concurrently(call: Callable[..., T], items: Iterable[tuple[Any, ...]], at_once: int) -> Iterator[T]:
    """Yield ``call(*item)`` for each item from ``at_once`` threads, in the order in which they finish."""
    pool = ThreadPoolExecutor(at_once)
    try:
        waiting: set[Future[T]] = set()
        for item in items:
            waiting.add(pool.submit(call, *item))
            if len(waiting) == at_once:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(waiting))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _problem(item: _Loaded, bad: BadSample) -> Problem:
    where = item.conversation
    return Problem(where.source, where.line or item.index + 1, bad.reason, bad.detail)
