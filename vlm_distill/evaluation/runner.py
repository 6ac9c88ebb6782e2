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
from vlm_distill.models.answers import Answer
from vlm_distill.models.processor import Processor, Prompt
from vlm_distill.models.thinking import split_thought

from .kept import PREDICTIONS, Kept, Store, kept_answer, matched, question_digest
from .scoring.vqa import exact_match, soft_accuracy

T = TypeVar("T")

#: Every rank's list of objects, in rank order, on every rank.
AllGather = Callable[[list[Any]], list[list[Any]]]
#: Answers to a batch of prompts, or why a prompt has none.
Ask = Callable[[Sequence[Prompt]], Sequence[Answer | BadSample]]

#: Longest answer to a data source's questions in tokens, where nothing else is said.
SOURCE_LENGTH = 32
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
        answer: the model's answer without thoughts; empty where a thought never ended.
        probability: the model's own, of the whole answer with its end token: exp of the summed log-probabilities.
        exact, soft: scores in 0…1; 0 where there is no right answer to compare with.
        question_type: the data's own class of the question, or ``None``.
        image: path of the first image; ``sha256:…`` where the data hold bytes; ``None`` without an image. Questions
            with equal values are about one picture.
        score: by a benchmark's rules, 0…1; ``None`` without such rules, or where they leave the question out.
        complete: whether the answer, and any thought in it, came to its end before the longest that was allowed.
        generated: all that the model wrote, where it wrote thoughts: ``answer`` is what is left without them.
        asked: digest of the question (``kept.question_digest``), empty where answers are not kept.
        by: digest of the model and the settings that gave the answer.
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
    generated: str | None = None
    asked: str = ""
    by: str = ""


@dataclass
class _Loaded:
    index: int
    conversation: Conversation
    images: list[Image.Image]
    asked: str = ""


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
    resume: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    load: Callable[[ImageSource], Image.Image] = load_image,
    skipped: list[Problem] | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
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
        resume: plain values that tell this model with its settings from others. Then every rank writes its batches to
            ``out/unfinished`` as they come, and an interrupted evaluation resumes under the same values, on any number
            of ranks, to the same predictions. Kept answers are those to the same questions (:mod:`.kept`): questions
            that changed are asked again, and right answers may change.
        about: written to ``out/asked.json`` beside ``resume``; then the answers of a finished evaluation are kept too.
        load: decodes an image.
        skipped: receives the samples that were left out, of all ranks.
        progress: called with (questions done over all ranks, questions in all) after each batch.
        tell: called on rank 0 with a line that says how many answers are kept from before, if any are.
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
    store = None if resume is None or out is None else Store(out, {**resume, "max_new_tokens": max_new_tokens}, rank)

    # One rank reads what is kept from before: the others may run where they do not see its files.
    results = _recall(store, model, source, rows, load, references, tell) if store is not None and rank == 0 else {}
    if all_gather is not None:
        results = all_gather([results])[0][0]

    # Batches are cut from all rows, so that those still to be asked are the same ones whatever is kept.
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    left = [open_rows for batch in batches if (open_rows := [row for row in batch if row not in results])]
    rounds = math.ceil(len(left) / world)
    mine = [left[i] if i < len(left) else [] for i in range(rank, rounds * world, world)]

    before, made = len(results), _Results()
    # To keep this rank in step with the others where its own batch holds nothing.
    dummy = _first_good(model, source, rows, load, references) if left and at_once is None else None
    batches_read = _load_ahead(source, mine, load, references, digests=store is not None)
    reply = partial(_reply, model, ask or partial(model.generate, max_new_tokens=max_new_tokens), dummy, at_once)
    for done, found in enumerate(_answered(reply, batches_read, at_once), start=1):
        made |= found
        if store is not None and found:
            store.add([_kept(p) for p in found.values() if isinstance(p, Prediction)], _unusable(found))
        if progress is not None:
            progress(min(before + done * world * batch_size, len(rows)), len(rows))

    for part in [made] if all_gather is None else [part for parts in all_gather([made]) for part in parts]:
        results |= part
    by = "" if store is None else store.key
    predictions = [replace(found, by=by) for _, found in sorted(results.items()) if isinstance(found, Prediction)]
    problems = sorted((found for found in results.values() if isinstance(found, Problem)), key=lambda p: p.line)
    if skipped is not None:
        skipped += problems
    if rank == 0:
        if store is not None:
            # Before predictions.jsonl is written anew: it may be where they are.
            rows_now, questions_now = {*rows}, {prediction.asked for prediction in predictions}
            store.set_aside(
                [kept for kept in store.answers() if kept.index not in rows_now and kept.asked not in questions_now]
            )
        if finish is not None:
            finish(predictions, problems)
        elif out is not None:
            write_predictions(out, predictions, problems, questions=len(source))
        if store is not None:
            store.finish(about, _unusable(results))
    return predictions


#: What became of rows, by their numbers.
_Results = dict[int, "Prediction | Problem"]


def _kept(prediction: Prediction) -> Kept:
    return kept_answer(asdict(prediction))


def _unusable(results: _Results) -> list[int]:
    return [row for row, found in results.items() if isinstance(found, Problem)]


def _recall(
    store: Store,
    model: Answerer,
    source: Questions,
    rows: Sequence[int],
    load: Callable[[ImageSource], Image.Image],
    references: bool,
    tell: Callable[[str], None] | None,
) -> _Results:
    """Return what is known of rows without asking: kept answers, scored anew, and rows that still cannot be asked."""
    kept = store.answers()
    unusable = store.unusable()
    if not kept and not unusable:
        return {}
    results: _Results = {}
    for row, answer in recalled(kept, source, rows, references).items():
        results[row] = score_kept(row, source[row], answer)
    if results and tell is not None:
        tell(f"{source.name}: {len(results):,} of {len(rows):,} answers kept from before in {store.folder}")
    for row in rows:
        if row in unusable and row not in results:
            found = _usable(model, source, row, load, references)
            if isinstance(found, Problem):
                results[row] = found
    return results


def recalled(kept: Sequence[Kept], source: Questions, rows: Sequence[int], references: bool = True) -> dict[int, Kept]:
    """Return the kept answers to a source's questions as they are now, by row."""

    def digest(row: int) -> str | None:
        found = read_question(source, row, references) if row < len(source) else None
        return question_digest(found) if isinstance(found, Conversation) else None

    return matched(kept, rows, digest)


def _usable(
    model: Answerer,
    source: Questions,
    row: int,
    load: Callable[[ImageSource], Image.Image],
    references: bool,
) -> _Loaded | Problem:
    """Return a question that the model can be asked, or why it cannot."""
    conversation = read_question(source, row, references)
    if isinstance(conversation, Problem):
        return conversation
    try:
        item = _Loaded(row, conversation, _images(conversation, load))
        _encode(model, item)
    except BadSample as bad:
        return Problem(source.name, conversation.line or row + 1, bad.reason, bad.detail)
    return item


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


def limit_mark(source: Countable, limit: int | None) -> dict[str, int]:
    """Return ``limited_from``, the number of questions there are, where a limit leaves some of them out."""
    return {"limited_from": len(source)} if len(share(source, limit)) < len(source) else {}


def read_question(source: Questions, index: int, references: bool = True) -> Conversation | Problem:
    """Return a question, with ``references`` one that can be scored, or why there is none."""
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
    for row in rows:
        found = _usable(model, source, row, load, references)
        if isinstance(found, _Loaded):
            return found
    return None


def _load_ahead(
    source: Questions,
    batches: Sequence[Sequence[int]],
    load: Callable[[ImageSource], Image.Image],
    references: bool,
    *,
    digests: bool,
) -> Iterator[tuple[list[_Loaded], _Results]]:
    """Yield batches in order, the images of the next ones decoded by threads meanwhile. Rows are read in this thread.

    Where ``digests``, each question gets its digest there as well.
    """

    def prepare(index: int, conversation: Conversation) -> _Loaded:
        images = _images(conversation, load)
        return _Loaded(index, conversation, images, question_digest(conversation) if digests else "")

    Waiting = list[tuple[int, Conversation | Problem, Future[_Loaded] | None]]
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:

        def submit(batch: Sequence[int]) -> Waiting:
            read = [(index, read_question(source, index, references)) for index in batch]
            return [
                (index, row, pool.submit(prepare, index, row) if isinstance(row, Conversation) else None)
                for index, row in read
            ]

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
                    unusable[index] = Problem(source.name, row.line or index + 1, bad.reason, bad.detail)
            yield loaded, unusable


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


def _reply(
    model: Answerer,
    ask: Ask,
    dummy: _Loaded | None,
    at_once: int | None,
    loaded: list[_Loaded],
    unusable: _Results,
) -> _Results:
    """Return what became of one batch, the rows that could not be read included."""
    if at_once is not None and loaded:
        return unusable | _answer(model, ask, loaded, loaded[0])
    if dummy is not None:
        return unusable | _answer(model, ask, loaded, dummy)
    return unusable | _fitting(model, loaded)[1]  # nothing fits this model


def _answer(model: Answerer, ask: Ask, loaded: Sequence[_Loaded], dummy: _Loaded) -> _Results:
    """Return what became of one batch, from exactly one call of ``ask`` that reaches the model."""
    kept, results = list(loaded), _Results()

    def answered() -> Sequence[Answer | BadSample]:
        return ask([(item.conversation, item.images) for item in kept or [dummy]])

    try:
        answers = answered()
    except BadSample:
        # Prompts are encoded before the model's first forward, so the other ranks have not been left waiting: take out
        # those that do not fit this model and ask once more.
        kept, results = _fitting(model, loaded)
        answers = answered()
    # With nothing kept, the one answer is the dummy's and falls off here.
    for item, answer in zip(kept, answers, strict=False):
        if isinstance(answer, BadSample):
            results[item.index] = _problem(item, answer)
            continue
        text = answer.text if answer.marked is None else answer.marked
        probability = math.exp(sum(answer.logprobs))
        results[item.index] = _score(item.index, item.conversation, text, probability, answer.complete, item.asked)
    return results


def _fitting(model: Answerer, loaded: Sequence[_Loaded]) -> tuple[list[_Loaded], _Results]:
    """Return the prompts that fit the model, and why the others do not."""
    kept, unfit = [], _Results()
    for item in loaded:
        try:
            _encode(model, item)
            kept.append(item)
        except BadSample as bad:
            unfit[item.index] = _problem(item, bad)
    return kept, unfit


def _problem(item: _Loaded, bad: BadSample) -> Problem:
    where = item.conversation
    return Problem(where.source, where.line or item.index + 1, bad.reason, bad.detail)


def _score(
    index: int, conversation: Conversation, text: str, probability: float, complete: bool = True, asked: str = ""
) -> Prediction:
    """Return a scored answer; ``text`` is all that the model wrote, of which thoughts are not scored."""
    kind = conversation.metadata.get("question_type")
    references = conversation.references
    answer, thought_ended = split_thought(text)
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
        complete=complete and thought_ended,
        generated=text if text != answer else None,
        asked=asked,
    )


def score_kept(index: int, conversation: Conversation, answer: Kept) -> Prediction:
    """Return a kept answer, scored by the right answers as they are now."""
    return _score(index, conversation, answer.text, answer.probability, answer.complete, answer.asked)


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
        row = read_question(train, i)
        if isinstance(row, Conversation):
            by_question.setdefault(row.question, Counter()).update(row.references)
            overall.update(row.references)
    if not overall:
        raise UserError(f"{train.name}: no answers to learn a baseline from; give a training source with answers")
    predictions = []
    for i in evenly_spaced(len(test), limit):
        row = read_question(test, i)
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


def summarise(
    predictions: Sequence[Prediction], skipped: Sequence[Problem] = (), questions: int | None = None
) -> dict[str, Any]:
    """Return the scores overall and by question type.

    Args:
        questions: in the source, where that is more than were asked.

    Returns:
        ``n``, the means ``exact`` and ``soft`` in 0…1 (``None`` where n is 0), ``interval`` (Wilson, 95 %, of
        ``exact``), ``by_type`` with the same four keys for each question type, ``skipped`` (reason to number), ``cut``
        (answers without an end), and where a limit left questions out ``limited_from``: how many there are.
    """
    kinds = sorted({p.question_type for p in predictions if p.question_type is not None})
    asked = len(predictions) + len(skipped)
    return {
        **_means(predictions),
        "by_type": {kind: _means([p for p in predictions if p.question_type == kind]) for kind in kinds},
        "skipped": dict(Counter(problem.reason for problem in skipped)),
        "cut": sum(not p.complete for p in predictions),
        **({} if questions is None or questions <= asked else {"limited_from": questions}),
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
    words = f"exact match {scores['exact']:.2%}, VQA accuracy {scores['soft']:.2%} on {scores['n']:,} questions"
    return words + "".join(f", {note}" for note in notes_on(scores))


def commonest(problems: Sequence[Problem]) -> str:
    """Return the commonest reason among problems with its number and an example."""
    if not problems:
        return "there is none"
    reason, count = Counter(problem.reason for problem in problems).most_common(1)[0]
    first = next(problem for problem in problems if problem.reason == reason)
    detail = f" (line {first.line}: {first.detail})" if first.detail else f" (the first in line {first.line})"
    return f"{count:,} × {reason}{detail}"


def notes_on(scores: Mapping[str, Any]) -> list[str]:
    """Return what to know about scores: whether a limit left questions out, and how many answers were cut."""
    notes = []
    if scores.get("limited_from"):
        notes.append(f"limited: of {scores['limited_from']:,} questions")
    if scores.get("cut"):
        notes.append(f"{scores['cut']:,} answers cut before their end (--max-new-tokens allows longer ones)")
    return notes


def write_predictions(
    folder: Path,
    predictions: Sequence[Prediction],
    skipped: Sequence[Problem] = (),
    questions: int | None = None,
) -> None:
    """Write ``predictions.jsonl`` (one :class:`Prediction` a line) and ``scores.json`` (:func:`summarise`)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / PREDICTIONS, predictions)
    scores = json.dumps(summarise(predictions, skipped, questions), indent=2, ensure_ascii=False)
    (folder / "scores.json").write_text(scores + "\n", "utf-8")


def write_lines(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one :class:`Prediction` a line, all of them or none: a file that is there may hold kept answers."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions), "utf-8")
    unfinished.replace(path)


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions in a file that :func:`write_predictions` wrote."""
    predictions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                predictions.append(_prediction(json.loads(line.decode())))
            except (ValueError, TypeError, RecursionError):
                raise UserError(
                    f"{path}, line {number}: damaged, not a prediction; evaluate again, which asks this question anew"
                ) from None
    return predictions


def _prediction(line: Any) -> Prediction:
    """Return the prediction in a line; raises ``ValueError`` or ``TypeError`` where it is none."""
    kept_answer(line)
    found = Prediction(**line)
    numbers, text = (int, float), (str, type(None))
    types: dict[str, Any] = {"source": str, "question": str, "references": list, "answer": str, "line": int, "by": str}
    types |= {"exact": numbers, "soft": numbers, "score": (*numbers, type(None)), "question_type": text, "image": text}
    for name, expected in types.items():
        if not isinstance(getattr(found, name), expected):
            raise ValueError(f"{name} has another type")
    return found
