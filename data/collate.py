"""Samples to micro-batches: both models' encodings, aligned, documents packed, and rows put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from .alignment import group_tokens
from .batch import DistillationBatch, Encoded, Groups, Processor, Rows
from .conversation import Conversation, Document, message_text
from .errors import BadSample


@dataclass(frozen=True)
class Turns:
    """What of a conversation is learnt, and how long it may be besides its whole length.

    Attributes:
        last_only: only the last answer is supervised; earlier ones are context.
        max_prompt: the most tokens before the last answer, in either model; ``None``: any number.
        max_response: the most tokens of the last answer, its end tokens counted.
        ends: whether end tokens are learnt; not those that a template writes after an answer that was cut.
    """

    last_only: bool = False
    max_prompt: int | None = None
    max_response: int | None = None
    ends: bool = True


EVERY_ANSWER = Turns()


@dataclass
class Pair:
    """One conversation, or one or more documents, as both models receive it.

    Attributes:
        student: the student's row.
        teacher: the teacher's row; ``None`` when training without one.
        student_tokens: int64 ``[n]``, indices of the supervised tokens in the student's row.
        teacher_tokens: int64 ``[n]``, indices in the teacher's row of the tokens they are aligned with; the same as
            ``student_tokens`` without a teacher. With ``groups``: ``[m]``, of all of the teacher's supervised tokens.
        distilled: bool ``[n]``; false where student and teacher expect different end tokens, or in no group.
        groups: int64 ``[G, 2]`` of both models, as :func:`~data.alignment.group_tokens` gives them.
        samples: rows of sources that end here.
        document: whether it is plain text, which may stand in a row with other documents.
    """

    student: Encoded
    teacher: Encoded | None
    student_tokens: Tensor
    teacher_tokens: Tensor
    distilled: Tensor
    groups: tuple[Tensor, Tensor] | None = None
    samples: int = 1
    document: bool = False


@dataclass(frozen=True)
class Collator:
    """A run's way from samples to micro-batches.

    Attributes:
        student, teacher: the models' processors; there may be no teacher.
        max_length: the most tokens in a row of either model.
        turns: what of conversations is learnt.
        grouped: whether the models have different tokenizers.
    """

    student: Processor
    teacher: Processor | None
    max_length: int
    turns: Turns = EVERY_ANSWER
    grouped: bool = False

    def encode(self, sample: Conversation | Document, images: Sequence[Image.Image] = ()) -> list[Pair]:
        """One pair of a conversation, one or more of a document. Raises ``BadSample`` as these do."""
        models = self.student, self.teacher, self.max_length
        if isinstance(sample, Document):
            return encode_document(sample, *models)
        return [encode_pair(sample, images, *models, turns=self.turns, grouped=self.grouped)]

    def batch(self, pairs: Sequence[Pair]) -> DistillationBatch:
        """A micro-batch, its documents packed."""
        packed = pack([pair for pair in pairs if pair.document], self.max_length)
        rows = [pair for pair in pairs if not pair.document] + packed
        return collate(rows, self.student, self.teacher, grouped=self.grouped)


def encode_pair(
    conversation: Conversation,
    images: Sequence[Image.Image],
    student: Processor,
    teacher: Processor | None,
    max_length: int,
    *,
    turns: Turns = EVERY_ANSWER,
    grouped: bool = False,
) -> Pair:
    """A conversation encoded for both models, its supervised tokens aligned.

    The answers' tokens must have the same ids in both. The end tokens after an answer are compared in order: where
    they differ, or the teacher has fewer, the student's token stays supervised and is not distilled; end tokens that
    only the teacher has are left out. With different tokenizers, runs of tokens that spell the same text are grouped.

    Args:
        conversation: the sample.
        images: its images, decoded.
        student: the student's processor.
        teacher: the teacher's processor, if there is a teacher.
        max_length: the most tokens either model may receive, image tokens counted.
        turns: what of the conversation is learnt, and further limits.
        grouped: whether the models have different tokenizers.

    Raises:
        BadSample: it is too long for one of the models (nothing is ever cut off), has no supervised token or one that
            no token precedes, or its answers differ between the models.
    """
    student_row = _encode("student", student, conversation, images, max_length, turns)
    if teacher is None:
        tokens = student_row.supervised.nonzero().flatten()
        return Pair(student_row, None, tokens, tokens, torch.ones(len(tokens), dtype=torch.bool))
    teacher_row = _encode("teacher", teacher, conversation, images, max_length, turns)
    if grouped:
        answers = [message_text(m) for m in conversation.messages if m["role"] == "assistant"]
        return _grouped(student_row, teacher_row, answers[-1:] if turns.last_only else answers)
    return Pair(student_row, teacher_row, *_align(student_row, teacher_row))


def _encode(
    role: str,
    processor: Processor,
    conversation: Conversation,
    images: Sequence[Image.Image],
    max_length: int,
    turns: Turns,
) -> Encoded:
    row = processor.encode(conversation, images)
    if len(row.input_ids) > max_length:
        raise BadSample("too long", f"{len(row.input_ids)} tokens for the {role}, limit {max_length}")
    if not row.supervised.any():
        raise BadSample("no supervised token", f"the {role}'s template marks none")
    if row.supervised[0]:
        raise BadSample("first token is supervised", f"nothing predicts the {role}'s first token")
    last = _runs(row)[-1]
    response = last.answer + last.ends
    for part, length, limit in (
        ("before the last answer", response[0], turns.max_prompt),
        ("in the last answer", len(response), turns.max_response),
    ):
        if limit is not None and length > limit:
            raise BadSample("too long", f"{length} tokens {part} for the {role}, limit {limit}")
    row = _from(row, response[0]) if turns.last_only else row
    return row if turns.ends else _without_ends(row)


def _from(row: Encoded, start: int) -> Encoded:
    """The same row, supervised from a place on, where its last answer begins."""
    later = torch.arange(len(row.input_ids)) >= start
    places = row.places
    if places is not None:
        places = places[row.supervised.nonzero().flatten() >= start]
        places = places - torch.tensor([int(places[0, 0]), 0, 0])
    return replace(row, supervised=row.supervised & later, ends=row.ends & later, places=places)


def _without_ends(row: Encoded) -> Encoded:
    """The same row, its end tokens not supervised."""
    kept = ~row.ends[row.supervised]
    if not kept.any():
        raise BadSample("no supervised token", "the answer is its end token alone")
    places = None if row.places is None else row.places[kept]
    return replace(row, supervised=row.supervised & ~row.ends, ends=torch.zeros_like(row.ends), places=places)


def encode_document(document: Document, student: Processor, teacher: Processor | None, max_length: int) -> list[Pair]:
    """Plain text for both models, which must cut it into the same tokens: pieces of at most ``max_length`` of them.

    All tokens but each piece's first are supervised and distilled.

    Raises:
        BadSample: the two tokenizers differ on it, or there is nothing to learn.
    """
    row = student.encode_document(document)
    ids = row.input_ids.tolist()
    if teacher is not None:
        others = teacher.encode_document(document).input_ids.tolist()
        if ids != others:
            raise BadSample("misaligned", _difference(ids, others))
    pairs: list[Pair] = []
    for start in range(0, len(ids), max_length):
        piece = slice(start, start + max_length)
        supervised = row.supervised[piece].clone()
        supervised[0] = False
        if supervised.any():
            encoded = Encoded(row.input_ids[piece], supervised, row.ends[piece] & supervised)
            tokens = supervised.nonzero().flatten()
            own = None if teacher is None else encoded
            every = torch.ones(len(tokens), dtype=torch.bool)
            pairs.append(Pair(encoded, own, tokens, tokens, every, samples=int(not pairs), document=True))
    if not pairs:
        raise BadSample("no supervised token", "the document is one token long")
    return pairs


def pack(documents: Sequence[Pair], max_length: int) -> list[Pair]:
    """Documents put together into rows of at most ``max_length`` tokens: the longest first, each into the first row
    that has room for it.

    Their ``position_ids`` start again with each document. Models that are given these and no attention mask keep the
    documents apart.
    """
    rows: list[list[Pair]] = []
    lengths: list[int] = []
    for pair in sorted(documents, key=lambda pair: -len(pair.student.input_ids)):
        length = len(pair.student.input_ids)
        place = next((i for i, used in enumerate(lengths) if used + length <= max_length), len(rows))
        if place == len(rows):
            rows.append([])
            lengths.append(0)
        rows[place].append(pair)
        lengths[place] += length
    return [_packed(row) for row in rows]


def _packed(documents: Sequence[Pair]) -> Pair:
    rows = [pair.student for pair in documents]
    lengths = [len(row.input_ids) for row in rows]
    row = Encoded(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.supervised for row in rows]),
        torch.cat([row.ends for row in rows]),
        tensors={"position_ids": torch.cat([torch.arange(length) for length in lengths])},
    )
    tokens = row.supervised.nonzero().flatten()
    return Pair(
        row,
        None if documents[0].teacher is None else row,
        tokens,
        tokens,
        torch.cat([pair.distilled for pair in documents]),
        samples=sum(pair.samples for pair in documents),
        document=True,
    )


def _grouped(student: Encoded, teacher: Encoded, answers: Sequence[str]) -> Pair:
    ours, theirs = group_tokens(student, teacher, answers)
    tokens = student.supervised.nonzero().flatten()
    distilled = torch.zeros(len(tokens), dtype=torch.bool)
    for first, stop in ours.tolist():
        distilled[first:stop] = True
    return Pair(student, teacher, tokens, teacher.supervised.nonzero().flatten(), distilled, (ours, theirs))


@dataclass
class _Run:
    """One answer: places of its tokens and of the end tokens after them."""

    answer: list[int]
    ends: list[int]


def _runs(row: Encoded) -> list[_Run]:
    """Answers in order. One ends where supervision stops, or where a token that is not an end follows an end."""
    runs: list[_Run] = []
    previous = -2
    ends = row.ends.tolist()
    for i in row.supervised.nonzero().flatten().tolist():
        if i != previous + 1 or (runs[-1].ends and not ends[i]):
            runs.append(_Run([], []))
        (runs[-1].ends if ends[i] else runs[-1].answer).append(i)
        previous = i
    return runs


def _align(student: Encoded, teacher: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the student's supervised tokens, the teacher's places beside them, and which are distilled: ``[n]``."""
    student_runs, teacher_runs = _runs(student), _runs(teacher)
    if len(student_runs) != len(teacher_runs):
        raise BadSample(
            "misaligned", f"{len(student_runs)} answers for the student, {len(teacher_runs)} for the teacher"
        )
    student_ids, teacher_ids = student.input_ids.tolist(), teacher.input_ids.tolist()
    ours: list[int] = []
    theirs: list[int] = []
    distilled: list[bool] = []
    for number, (mine, other) in enumerate(zip(student_runs, teacher_runs, strict=True), 1):
        my_answer = [student_ids[i] for i in mine.answer]
        other_answer = [teacher_ids[i] for i in other.answer]
        if my_answer != other_answer:
            raise BadSample("misaligned", f"answer {number}: {_difference(my_answer, other_answer)}")
        # Where the teacher has no token left, its last place stands in; it is not distilled.
        last = (other.answer + other.ends)[-1]
        ends = [other.ends[k] if k < len(other.ends) else last for k in range(len(mine.ends))]
        ours += mine.answer + mine.ends
        theirs += other.answer + ends
        distilled += [True] * len(mine.answer)
        distilled += [
            k < len(other.ends) and student_ids[i] == teacher_ids[j]
            for k, (i, j) in enumerate(zip(mine.ends, ends, strict=True))
        ]
    return torch.tensor(ours), torch.tensor(theirs), torch.tensor(distilled)


def _difference(student: list[int], teacher: list[int]) -> str:
    for k, (mine, other) in enumerate(zip(student, teacher, strict=False), 1):
        if mine != other:
            return f"token {k} is {mine} for the student, {other} for the teacher"
    return f"{len(student)} tokens for the student, {len(teacher)} for the teacher"


def collate(
    pairs: Sequence[Pair], student: Processor, teacher: Processor | None, *, grouped: bool = False
) -> DistillationBatch:
    """A micro-batch of any number of samples, none included.

    Where a model has a vision encoder and no sample an image, or where there is no sample, both models get one more row
    with a blank image and no supervised token: every rank then runs the same modules, and none waits for another.

    Args:
        pairs: the samples.
        student: the student's processor.
        teacher: the teacher's processor, or ``None`` as in the pairs.
        grouped: whether the pairs have groups; a micro-batch without samples then has them too.

    Returns:
        The batch; ``positions`` are those of the tokens before the supervised ones, ``[N]`` over all rows.
    """
    student_rows = [pair.student for pair in pairs]
    teacher_rows = [pair.teacher for pair in pairs if pair.teacher is not None]
    if _needs_dummy(student, student_rows) or (teacher is not None and _needs_dummy(teacher, teacher_rows)):
        student_rows.append(student.dummy())
        if teacher is not None:
            teacher_rows.append(teacher.dummy())
    nothing = torch.empty(0, dtype=torch.int64)
    return DistillationBatch(
        student=_rows(student, student_rows, [pair.student_tokens for pair in pairs]),
        teacher=None if teacher is None else _rows(teacher, teacher_rows, [pair.teacher_tokens for pair in pairs]),
        targets=torch.cat([nothing, *(pair.student.input_ids[pair.student_tokens] for pair in pairs)]),
        distilled=torch.cat([nothing.bool(), *(pair.distilled for pair in pairs)]),
        samples=sum(pair.samples for pair in pairs),
        images=sum(pair.student.images for pair in pairs),
        groups=_groups(pairs) if grouped else None,
    )


def _groups(pairs: Sequence[Pair]) -> Groups:
    """The pairs' groups, their tokens counted through the micro-batch."""
    ours, theirs, targets = [torch.empty(0, 2, dtype=torch.int64)], [torch.empty(0, 2, dtype=torch.int64)], []
    rows, teacher_rows = 0, 0
    for pair in pairs:
        assert pair.groups is not None
        assert pair.teacher is not None
        ours.append(pair.groups[0] + rows)
        theirs.append(pair.groups[1] + teacher_rows)
        targets.append(pair.teacher.input_ids[pair.teacher_tokens])
        rows, teacher_rows = rows + len(pair.student_tokens), teacher_rows + len(pair.teacher_tokens)
    return Groups(torch.cat(ours), torch.cat(theirs), torch.cat([torch.empty(0, dtype=torch.int64), *targets]))


def _needs_dummy(processor: Processor, rows: list[Encoded]) -> bool:
    return not rows or (processor.has_vision and not any(row.images for row in rows))


def _rows(processor: Processor, rows: list[Encoded], tokens: list[Tensor]) -> Rows:
    inputs = processor.collate(rows)
    length = inputs["input_ids"].shape[1]
    positions = [row * length + places - 1 for row, places in enumerate(tokens)]
    return Rows(inputs, torch.cat([torch.empty(0, dtype=torch.int64), *positions]))
