"""Asks a model every question of a data source, on any number of ranks, and scores the answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from data.batch import Problem
from data.conversation import Conversation, ImageSource
from data.errors import BadSample, UserError
from data.images import load_image
from vlm_distill.models.interface import Answer, Processor, Prompt

from . import jsonl
from .scoring.vqa import exact_match, soft_accuracy

T = TypeVar("T")

#: Every rank's list of objects, in rank order, on every rank.
AllGather = Callable[[list[Any]], list[list[Any]]]
#: Answers to a batch of prompts, or why a prompt has none.
Ask = Callable[[Sequence[Prompt]], Sequence[Answer | BadSample]]

_DECODE_THREADS = 4
_BATCHES_AHEAD = 2


class Countable(Protocol):
    def __len__(self) -> int: ...


class Questions(Protocol):
    """What evaluation needs of a data source (``data.sources.Source`` is one)."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Conversation: ...
    def size(self, index: int, /) -> int: ...


class Answerer(Protocol):
    """What evaluation needs of a model (``VisionLanguageModel`` is one)."""

    processor: Processor

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> Sequence[Answer | BadSample]: ...


@dataclass(frozen=True)
class Prediction:
    """One answered and scored question.

    Attributes:
        index: row in the source, from 0.
        source, line: where the question stands, for a person.
        question, references: the last user text and the right answers.
        answer: the model's answer.
        probability: the model's own, of the whole answer with its end token: exp of the summed log-probabilities.
        exact, soft: scores in 0…1; 0 where there is no right answer to compare with.
        question_type: the data's own class of the question, or ``None``.
        image: path of the first image; ``sha256:…`` where the data hold bytes; ``None`` without an image. Questions
            with equal values are about one picture.
        score: by a benchmark's rules, 0…1; ``None`` without such rules, or where they leave the question out.
        complete: whether the answer came to its end before the longest that was allowed.
    """

    index: int
    source: str
    line: int
    question: str
    references: list[str]
    answer: str
    probability: float
    exact: float
    soft: float
    question_type: str | None = None
    image: str | None = None
    score: float | None = None
    complete: bool = True


@dataclass
class _Loaded:
    index: int
    conversation: Conversation
    images: list[Image.Image]


def evaluate(
    model: Answerer,
    source: Questions,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    all_gather: AllGather | None = None,
    out: Path | None = None,
    resume: str | None = None,
    load: Callable[[ImageSource], Image.Image] = load_image,
    skipped: list[Problem] | None = None,
    progress: Callable[[int, int], None] | None = None,
    ask: Ask | None = None,
    at_once: int | None = None,
    references: bool = True,
    finish: Callable[[list[Prediction], list[Problem]], None] | None = None,
) -> list[Prediction]:
    """Greedy answers to every question, scored, in the order of the source.

    Batches are cut once from the source sorted by length and dealt to the ranks in turn, so that neither their content
    nor an answer depends on ``world``. Every rank makes the same number of ``generate`` calls with at least one prompt
    each: under ZeRO-3 ranks wait for each other inside them. Samples that cannot be read are left out of the scores
    and listed in ``skipped``.

    Args:
        model: answers batches of prompts.
        source: the questions with their right answers.
        limit: ask only about this many questions, evenly spaced over the source (:func:`share`).
        all_gather: gives every rank's list to every rank; needed when ``world`` > 1.
        out: folder for ``predictions.jsonl`` and ``scores.json``, written by rank 0.
        resume: names this model with its settings; then every rank writes its batches to ``out/unfinished`` as they
            come, and an evaluation that was cut short goes on under the same name, on any number of ranks, to the same
            predictions.
        load: decodes an image.
        skipped: receives the samples that were left out, of all ranks.
        progress: called with (questions done over all ranks, questions in all) after each batch.
        ask: answers a batch, in place of the model's ``generate``.
        at_once: batches asked at once, by threads, where the model runs elsewhere: ranks do not wait for each other
            then, and a batch without a prompt is not asked. Otherwise one after the other.
        references: leave out questions without a right answer.
        finish: called by rank 0 with everything, in place of writing ``predictions.jsonl`` and ``scores.json``; what is
            in ``unfinished`` stays there if it raises.

    Returns:
        The whole list, on every rank.
    """
    if world > 1 and all_gather is None:
        raise ValueError("evaluation on several ranks needs all_gather")
    rows = sorted(share(source, limit), key=lambda i: (source.size(i), i))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    journal = None
    if resume is not None and out is not None:
        journal = _Journal(out / "unfinished", [resume, source.name, rows, batch_size, max_new_tokens], rank)
    results = journal.finished() if journal is not None and rank == 0 else {}
    if all_gather is not None:
        results = all_gather([results])[0][0]
    left = [number for number in range(len(batches)) if number not in results]
    rounds = math.ceil(len(left) / world)
    mine = [left[i] if i < len(left) else None for i in range(rank, rounds * world, world)]

    if ask is None:
        ask = partial(model.generate, max_new_tokens=max_new_tokens)
    dummy = _first_good(model, source, rows, load, references) if left and at_once is None else None

    def answer(
        number: int | None, read: tuple[list[_Loaded], list[Problem]]
    ) -> tuple[int | None, list[Prediction], list[Problem]]:
        loaded, problems = read
        if at_once is not None and loaded:
            predictions, refused = _answer(model, ask, loaded, loaded[0])
        elif dummy is not None:
            predictions, refused = _answer(model, ask, loaded, dummy)
        else:
            predictions, refused = [], _fitting(model, loaded)[1]  # nothing fits this model
        return number, predictions, problems + refused

    before, made = len(batches) - len(left), {}
    batches_read = _load_ahead(source, [[] if number is None else batches[number] for number in mine], load, references)
    for done, (number, predictions, problems) in enumerate(
        _answered(answer, zip(mine, batches_read, strict=True), at_once), start=1
    ):
        if number is not None:
            made[number] = predictions, problems
            if journal is not None:
                journal.add(number, predictions, problems)
        if progress is not None:
            progress(min((before + done * world) * batch_size, len(rows)), len(rows))

    for part in [made] if all_gather is None else [part for parts in all_gather([made]) for part in parts]:
        results |= part
    predictions = [p for answered, _ in results.values() for p in answered]
    problems = [p for _, unread in results.values() for p in unread]
    predictions.sort(key=lambda p: p.index)
    problems.sort(key=lambda p: p.line)
    if skipped is not None:
        skipped += problems
    if rank == 0 and (finish is not None or out is not None):
        if finish is not None:
            finish(predictions, problems)
        elif out is not None:
            write_predictions(out, predictions, problems)
        if journal is not None:
            journal.remove()
    return predictions


_Results = dict[int, tuple[list[Prediction], list[Problem]]]


class _Journal:
    """What is answered so far, a batch a line, in one file for each rank.

    Args:
        folder: of the journals; there is one while an evaluation is unfinished.
        settings: all that an answer depends on. Batches of another evaluation in the folder are not taken for ours.
        rank: of this process.
    """

    def __init__(self, folder: Path, settings: Any, rank: int) -> None:
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        self.rank = rank

    def finished(self) -> _Results:
        results: _Results = {}
        for path in sorted(self.folder.glob(f"{self.key}-*.jsonl")):
            for entry in jsonl.entries(path):
                predictions = [Prediction(**fields) for fields in entry["predictions"]]
                results[entry["batch"]] = predictions, [Problem(**fields) for fields in entry["problems"]]
        return results

    def add(self, batch: int, predictions: Sequence[Prediction], problems: Sequence[Problem]) -> None:
        entry = {"batch": batch, "predictions": [*map(asdict, predictions)], "problems": [*map(asdict, problems)]}
        jsonl.append(self.folder / f"{self.key}-{self.rank}.jsonl", entry)

    def remove(self) -> None:
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
        self.folder.rmdir()


def evenly_spaced(n: int, limit: int | None) -> list[int]:
    """``min(n, limit)`` indices spread evenly over ``range(n)``, always the same ones."""
    if limit is None or limit >= n:
        return list(range(n))
    return [i * n // limit for i in range(limit)]


def share(source: Countable, limit: int | None) -> list[int]:
    """The questions that a limit leaves, always the same ones; a source may know better which belong together."""
    if limit is not None and hasattr(source, "share"):
        return list(source.share(limit))
    return evenly_spaced(len(source), limit)


def _read(source: Questions, index: int, references: bool = True) -> Conversation | Problem:
    """A question that can be scored, or why there is none."""
    # Sources of the readers and benchmarks know it before the row is read.
    line = source.line(index) if hasattr(source, "line") else index + 1
    try:
        conversation = source[index]
        line = conversation.line or line
        if references and not conversation.references:
            raise BadSample("no reference answer")
    except BadSample as bad:
        return Problem(source.name, line, bad.reason, bad.detail)
    return conversation


def _images(conversation: Conversation, load: Callable[[ImageSource], Image.Image]) -> list[Image.Image]:
    return [load(image) for image in conversation.prompt().images]


def _encode(model: Answerer, item: _Loaded) -> None:
    """Raises ``BadSample`` where a question does not fit the model, exactly as ``generate`` would."""
    model.processor.encode(item.conversation.prompt(), item.images, generation=True)


def _first_good(
    model: Answerer,
    source: Questions,
    rows: Sequence[int],
    load: Callable[[ImageSource], Image.Image],
    references: bool,
) -> _Loaded | None:
    """A prompt to keep a rank in step with when its own batch holds nothing; its answer is thrown away."""
    for index in rows:
        conversation = _read(source, index, references)
        if isinstance(conversation, Conversation):
            try:
                item = _Loaded(index, conversation, _images(conversation, load))
                _encode(model, item)
                return item
            except BadSample:
                continue
    return None


def _load_ahead(
    source: Questions, batches: Sequence[Sequence[int]], load: Callable[[ImageSource], Image.Image], references: bool
) -> Iterator[tuple[list[_Loaded], list[Problem]]]:
    """Batches in order, the images of the next ones decoded by threads meanwhile. Rows are read in this thread."""
    Waiting = list[tuple[int, Conversation | Problem, Future[list[Image.Image]] | None]]
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:

        def submit(batch: Sequence[int]) -> Waiting:
            read = [(index, _read(source, index, references)) for index in batch]
            return [
                (index, row, pool.submit(_images, row, load) if isinstance(row, Conversation) else None)
                for index, row in read
            ]

        queue: deque[Waiting] = deque()
        upcoming = iter(batches)
        for _ in batches:
            while len(queue) <= _BATCHES_AHEAD and (batch := next(upcoming, None)) is not None:
                queue.append(submit(batch))
            loaded, problems = [], []
            for index, row, images in queue.popleft():
                if isinstance(row, Problem):
                    problems.append(row)
                    continue
                assert images is not None
                try:
                    loaded.append(_Loaded(index, row, images.result()))
                except BadSample as bad:
                    problems.append(Problem(source.name, row.line or index + 1, bad.reason, bad.detail))
            yield loaded, problems


def _answered(call: Callable[..., T], items: Iterable[tuple[Any, ...]], at_once: int | None) -> Iterator[T]:
    """``call(*item)`` for each of the items; with several at once as they come to their end, in any order."""
    if at_once is None:
        yield from (call(*item) for item in items)
        return
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


def _answer(
    model: Answerer, ask: Ask, loaded: Sequence[_Loaded], dummy: _Loaded
) -> tuple[list[Prediction], list[Problem]]:
    """Answers to one batch, from exactly one call of ``ask`` that reaches the model."""
    problems: list[Problem] = []
    kept = list(loaded)

    def answered() -> Sequence[Answer | BadSample]:
        return ask([(item.conversation, item.images) for item in kept or [dummy]])

    try:
        answers = answered()
    except BadSample:
        # Prompts are encoded before the model's first forward, so the other ranks have not been left waiting: take out
        # those that do not fit this model and ask once more.
        kept, problems = _fitting(model, loaded)
        answers = answered()
    predictions = []
    # With nothing kept, the one answer is the dummy's and falls off here.
    for item, answer in zip(kept, answers, strict=False):
        if isinstance(answer, BadSample):
            problems.append(_problem(item, answer))
            continue
        scored = _score(item.index, item.conversation, answer.text, math.exp(sum(answer.logprobs)))
        predictions.append(replace(scored, complete=answer.complete))
    return predictions, problems


def _fitting(model: Answerer, loaded: Sequence[_Loaded]) -> tuple[list[_Loaded], list[Problem]]:
    """The prompts that fit the model, and why the others do not."""
    kept, problems = [], []
    for item in loaded:
        try:
            _encode(model, item)
            kept.append(item)
        except BadSample as bad:
            problems.append(_problem(item, bad))
    return kept, problems


def _problem(item: _Loaded, bad: BadSample) -> Problem:
    where = item.conversation
    return Problem(where.source, where.line or item.index + 1, bad.reason, bad.detail)


def _score(index: int, conversation: Conversation, answer: str, probability: float) -> Prediction:
    kind = conversation.metadata.get("question_type")
    references = conversation.references
    return Prediction(
        index=index,
        source=conversation.source,
        line=conversation.line,
        question=conversation.question,
        references=references,
        answer=answer,
        probability=probability,
        exact=exact_match(answer, references) if references else 0.0,
        soft=soft_accuracy(answer, references) if references else 0.0,
        question_type=None if kind is None else str(kind),
        image=next((image_key(image) for image in conversation.prompt().images), None),
    )


def image_key(image: ImageSource) -> str:
    """What :class:`Prediction` knows an image by: its path, or ``sha256:…`` of its bytes."""
    if isinstance(image, str):
        return image
    content = image if isinstance(image, bytes) else image.tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"


def question_only_baseline(train: Questions, test: Questions, *, limit: int | None = None) -> list[Prediction]:
    """What can be scored without looking: the commonest training answer to each question's text.

    A question that training never asks gets the commonest answer of all. Of equally common answers the one met first
    is taken. ``probability`` is that answer's share of the training answers it was chosen from. Bad samples are passed
    over.
    """
    by_question: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for i in range(len(train)):
        row = _read(train, i)
        if isinstance(row, Conversation):
            by_question.setdefault(row.question, Counter()).update(row.references)
            overall.update(row.references)
    if not overall:
        raise UserError(f"{train.name}: no answers to learn a baseline from; give a training source with answers")
    predictions = []
    for i in evenly_spaced(len(test), limit):
        row = _read(test, i)
        if isinstance(row, Conversation):
            counts = by_question.get(row.question, overall)
            answer, count = counts.most_common(1)[0]
            predictions.append(_score(i, row, answer, count / counts.total()))
    return predictions


def wilson_interval(mean: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927). Observations count as independent."""
    if n == 0:
        return 0.0, 1.0
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale


def summarise(predictions: Sequence[Prediction], skipped: Sequence[Problem] = ()) -> dict[str, Any]:
    """Scores overall and by question type.

    Returns:
        ``n``, the means ``exact`` and ``soft`` in 0…1 (``None`` where n is 0), ``interval`` (Wilson, 95 %, of
        ``exact``), ``by_type`` with the same four keys for each question type, and ``skipped``, reason to number.
    """
    kinds = sorted({p.question_type for p in predictions if p.question_type is not None})
    return {
        **_means(predictions),
        "by_type": {kind: _means([p for p in predictions if p.question_type == kind]) for kind in kinds},
        "skipped": dict(Counter(problem.reason for problem in skipped)),
    }


def _means(predictions: Sequence[Prediction]) -> dict[str, Any]:
    n = len(predictions)
    if n == 0:
        return {"n": 0, "exact": None, "soft": None, "interval": None}
    exact = math.fsum(p.exact for p in predictions) / n
    soft = math.fsum(p.soft for p in predictions) / n
    return {"n": n, "exact": exact, "soft": soft, "interval": list(wilson_interval(exact, n))}


def in_words(scores: Mapping[str, Any]) -> str:
    """The overall scores of :func:`summarise`, for a person."""
    if not scores["n"]:
        return "no question could be read"
    return f"exact match {scores['exact']:.2%}, VQA accuracy {scores['soft']:.2%} on {scores['n']:,} questions"


def write_predictions(folder: Path, predictions: Sequence[Prediction], skipped: Sequence[Problem] = ()) -> None:
    """Writes ``predictions.jsonl`` (one :class:`Prediction` a line) and ``scores.json`` (:func:`summarise`)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "predictions.jsonl", predictions)
    scores = json.dumps(summarise(predictions, skipped), indent=2, ensure_ascii=False)
    (folder / "scores.json").write_text(scores + "\n", "utf-8")


def write_lines(path: Path, predictions: Sequence[Prediction]) -> None:
    """One :class:`Prediction` a line."""
    path.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions), "utf-8")


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions in a file that :func:`write_predictions` wrote."""
    predictions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                predictions.append(Prediction(**json.loads(line.decode())))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not a prediction ({error}); evaluate again") from None
    return predictions
