"""Samples to micro-batches: both models' encodings, aligned, packed, and rows put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from PIL import Image
from torch import Tensor

from vlm_distill.caching.token_records import CachedRow, CachedRows, compact
from vlm_distill.losses.groups import TokenGroups

from .alignment import difference_of, group_tokens, match_tokens
from .batch import DistillationBatch, Encoded, ModelBatch, Origin, Processor
from .conversation import Conversation, Document, answer_pieces, count_images, is_answer
from .errors import BadSample


@dataclass(frozen=True)
class Turns:
    """What of a conversation is learnt, and how long it may be besides its whole length.

    Attributes:
        last_only: only the last supervised answer is; earlier ones are context.
        split: each supervised answer is a sample of its own, with what came before as its context.
        max_prompt: the most tokens before the last answer, in either model; ``None``: any number.
        max_response: the most tokens of the last answer, its end tokens counted.
        ends: whether end tokens are learnt; not those that a template writes after an answer that was cut.
    """

    last_only: bool = False
    split: bool = False
    max_prompt: int | None = None
    max_response: int | None = None
    ends: bool = True

    def parts(
        self, conversation: Conversation, images: Sequence[Image.Image]
    ) -> list[tuple[Conversation, Sequence[Image.Image]]]:
        """Return the conversation as it is encoded: once, or with ``split`` up to each supervised answer.

        Raises:
            BadSample: with ``split``, no answer is supervised.
        """
        if not self.split:
            return [(conversation, images)]
        answers = [k for k, message in enumerate(conversation.messages) if is_answer(message)]
        if not answers:
            raise BadSample("no supervised token", "every answer is masked")
        found = []
        for k in answers[-1:] if self.last_only else answers:
            messages = conversation.messages[: k + 1]
            count = count_images(messages)
            part = replace(conversation, messages=messages, images=conversation.images[:count])
            found.append((part, images[:count]))
        return found


EVERY_ANSWER = Turns()


@dataclass
class Pair:
    """One conversation, or a piece of a document, as both models receive it.

    Attributes:
        student: the student's row.
        teacher: the teacher's row; ``None`` when training without one.
        student_tokens: int64 ``[n]``, indices of the supervised tokens in the student's row.
        teacher_tokens: int64 ``[n]``, indices in the teacher's row of the tokens they are aligned with; the same as
            ``student_tokens`` without a teacher. With ``groups``: ``[m]``, of all of the teacher's supervised tokens.
        distilled: bool ``[n]``; false where student and teacher expect different end tokens, or in no group.
        groups: int64 ``[G, 2]`` of both models, as :func:`~data.alignment.group_tokens` gives them.
        samples: rows of sources that begin here.
        document: whether it is plain text, which always shares rows with other plain text.
        origins: where it comes from; empty where nobody needs to know.
    """

    student: Encoded
    teacher: Encoded | None
    student_tokens: Tensor
    teacher_tokens: Tensor
    distilled: Tensor
    groups: tuple[Tensor, Tensor] | None = None
    samples: int = 1
    document: bool = False
    origins: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class Collator:
    """A run's way from samples to micro-batches.

    Attributes:
        student, teacher: the models' processors; there may be no teacher.
        max_length: the most tokens in a row of either model.
        turns: what of conversations is learnt.
        grouped: whether the models have different tokenizers.
        packed: whether conversations share rows, of the student's and of the teacher's.
    """

    student: Processor
    teacher: Processor | None
    max_length: int
    turns: Turns = EVERY_ANSWER
    grouped: bool = False
    packed: tuple[bool, bool] = (False, False)

    def encode(
        self,
        sample: Conversation | Document,
        images: Sequence[Image.Image] = (),
        place: tuple[int, int] | None = None,
    ) -> list[Pair]:
        """Return a sample's pairs: one of a conversation, or one for each answer that is a sample of its own; one or
        more of a document. Raises ``BadSample`` as these do.

        With its ``place`` (source and row), which a cached teacher needs, the pairs have origins.
        """
        teacher = self.teacher.at(*place) if isinstance(self.teacher, CachedRows) and place else self.teacher
        models = self.student, teacher, self.max_length
        if isinstance(sample, Document):
            pairs = encode_document(sample, *models)
        else:
            pairs = []
            for number, (part, shown) in enumerate(self.turns.parts(sample, images)):
                if self.turns.split and isinstance(teacher, CachedRow):
                    models = self.student, teacher.answer(number, sample, images), self.max_length
                pair = encode_pair(part, shown, *models, turns=self.turns, grouped=self.grouped)
                pairs.append(replace(pair, samples=int(not pairs)))
        return pairs if place is None else self.placed(pairs, *place)

    def parts(
        self, sample: Conversation | Document, images: Sequence[Image.Image]
    ) -> list[tuple[Conversation | Document, Sequence[Image.Image]]]:
        """What each of a conversation's pairs is of, with its images."""
        return [(sample, images)] if isinstance(sample, Document) else [*self.turns.parts(sample, images)]

    def placed(self, pairs: Sequence[Pair], source: int, row: int) -> list[Pair]:
        """A sample's pairs with their origins."""
        found, start = [], 0
        for pair in pairs:
            tokens = int((pair.teacher or pair.student).supervised.sum())
            found.append(replace(pair, origins=(Origin(source, row, start, tokens),)))
            start += tokens
        return found

    def batch(self, pairs: Sequence[Pair]) -> DistillationBatch:
        """A micro-batch, its samples packed where they may be."""
        return collate(pairs, self.student, self.teacher, grouped=self.grouped, packed=self.packed)


def encode_pair(
    conversation: Conversation,
    images: Sequence[Image.Image],
    student: Processor,
    teacher: Processor | None,
    max_length: int,
    *,
    turns: Turns = EVERY_ANSWER,
    grouped: bool = False,
    role: str = "student",
) -> Pair:
    """A conversation encoded for both models, its supervised tokens aligned.

    The answers' own tokens must have the same ids in both (:func:`~data.alignment.match_tokens`). Where end tokens or
    what the templates write differ, the student's token stays supervised and is not distilled; what only the teacher
    has is left out. With different tokenizers, runs of tokens that spell the same text are grouped.

    Args:
        conversation: the sample.
        images: its images, decoded.
        student: the student's processor.
        teacher: the teacher's processor, if there is a teacher.
        max_length: the most tokens either model may receive, image tokens counted.
        turns: what of the conversation is learnt, and further limits.
        grouped: whether the models have different tokenizers.
        role: what the first model is, for errors.

    Raises:
        BadSample: it is too long for one of the models (nothing is ever cut off), has no supervised token or one that
            no token precedes, or its answers differ between the models.
    """
    student_row = _encode(role, student, conversation, images, max_length, turns)
    if teacher is None:
        tokens = student_row.supervised.nonzero().flatten()
        return Pair(student_row, None, tokens, tokens, torch.ones(len(tokens), dtype=torch.bool))
    teacher_row = _encode("teacher", teacher, conversation, images, max_length, turns)
    pieces = answer_pieces(conversation.messages)
    if grouped:
        return _grouped(student_row, teacher_row, pieces)
    return Pair(student_row, teacher_row, *match_tokens(student_row, teacher_row, pieces))


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
    row = _from(row, response[0]) if turns.last_only or turns.split else row
    return row if turns.ends else _without_ends(row)


def _from(row: Encoded, start: int) -> Encoded:
    """The same row, supervised from a place on, where its last answer begins."""
    later = torch.arange(len(row.input_ids)) >= start
    places = row.places
    if places is not None:
        places = places[row.supervised.nonzero().flatten() >= start]
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
            raise BadSample("misaligned", difference_of(ids, others))
    pairs: list[Pair] = []
    for encoded in _pieces(row, max_length):
        tokens = encoded.supervised.nonzero().flatten()
        if len(tokens):
            own = None if teacher is None else encoded
            every = torch.ones(len(tokens), dtype=torch.bool)
            pairs.append(Pair(encoded, own, tokens, tokens, every, samples=int(not pairs), document=True))
    if not pairs:
        raise BadSample("no supervised token", "the document is one token long")
    return pairs


def _pieces(row: Encoded, max_length: int) -> list[Encoded]:
    """A document's row in pieces, of which the first token is never supervised."""
    first = torch.arange(len(row.input_ids)) % max_length == 0
    supervised = row.supervised & ~first
    columns = (row.input_ids, supervised, row.ends & supervised)
    return [Encoded(*part) for part in zip(*(column.split(max_length) for column in columns), strict=True)]


def encode_teacher(
    sample: Conversation | Document,
    images: Sequence[Image.Image],
    teacher: Processor,
    max_length: int,
    turns: Turns = EVERY_ANSWER,
) -> tuple[list[Pair], Encoded]:
    """A sample for a teacher alone, as pairs without one, and its row as a cache keeps it.

    Raises:
        BadSample: as in :func:`encode_pair` and :func:`encode_document`.
    """
    if isinstance(sample, Document):
        pieces = _pieces(teacher.encode_document(sample), max_length)
        ids, supervised, ends = zip(*((p.input_ids, p.supervised, p.ends) for p in pieces), strict=True)
        whole = Encoded(torch.cat(ids), torch.cat(supervised), torch.cat(ends))
        return encode_document(sample, teacher, None, max_length), whole
    pairs: list[Pair] = []
    rows: list[Encoded] = []
    for part, shown in turns.parts(sample, images):
        pair = encode_pair(part, shown, teacher, None, max_length, turns=turns, role="teacher")
        pairs.append(replace(pair, samples=int(not pairs)))
        rows.append(compact(pair.student))
    return pairs, rows[0] if len(rows) == 1 else _joined(rows)


def _joined(rows: Sequence[Encoded]) -> Encoded:
    """The answers of one conversation, one row after the other, as a cache keeps them."""
    ids, supervised, ends, places = zip(*((r.input_ids, r.supervised, r.ends, r.places) for r in rows), strict=True)
    return Encoded(torch.cat(ids), torch.cat(supervised), torch.cat(ends), places=torch.cat(places))


def _grouped(student: Encoded, teacher: Encoded, pieces: Sequence[str]) -> Pair:
    ours, theirs = group_tokens(student, teacher, pieces)
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


def collate(
    pairs: Sequence[Pair],
    student: Processor,
    teacher: Processor | None,
    *,
    grouped: bool = False,
    packed: tuple[bool, bool] = (False, False),
) -> DistillationBatch:
    """A micro-batch of any number of samples, none included.

    Where a model has a vision encoder and no sample an image, or where there is no sample, both models get one more row
    with a blank image and no supervised token: every rank then runs the same modules, and none waits for another.

    Args:
        pairs: the samples.
        student: the student's processor.
        teacher: the teacher's processor, or ``None`` as in the pairs.
        grouped: whether the pairs have groups; a micro-batch without samples then has them too.
        packed: as in :class:`Collator`.

    Returns:
        The batch. Whatever rows the samples stand in, everything of them is in the pairs' order: ``positions``, those
        of the tokens before the supervised ones, ``[N]`` over all rows, and all that lies beside them.
    """
    student_rows = [pair.student for pair in pairs]
    teacher_rows = [pair.teacher for pair in pairs if pair.teacher is not None]
    if _needs_dummy(student, student_rows) or (teacher is not None and _needs_dummy(teacher, teacher_rows)):
        student_rows.append(student.dummy())
        if teacher is not None:
            teacher_rows.append(teacher.dummy())
    nothing = torch.empty(0, dtype=torch.int64)

    def rows(processor: Processor, samples: list[Encoded], tokens: list[Tensor], packs: bool) -> ModelBatch:
        # What a cache keeps is counted through the pairs: their rows stay in this order, and nothing is run on them.
        may = not isinstance(processor, CachedRows)
        shared = [may and (packs or (number < len(pairs) and pairs[number].document)) for number in range(len(samples))]
        return _rows(processor, samples, tokens, shared)

    lengths = torch.tensor([len(pair.student_tokens) for pair in pairs], dtype=torch.int64)
    return DistillationBatch(
        student=rows(student, student_rows, [pair.student_tokens for pair in pairs], packed[0]),
        teacher=None
        if teacher is None
        else rows(teacher, teacher_rows, [pair.teacher_tokens for pair in pairs], packed[1]),
        targets=torch.cat([nothing, *(pair.student.input_ids[pair.student_tokens] for pair in pairs)]),
        distilled=torch.cat([nothing.bool(), *(pair.distilled for pair in pairs)]),
        sample_of=torch.arange(len(pairs)).repeat_interleave(lengths),
        samples=sum(pair.samples for pair in pairs),
        images=sum(pair.student.images for pair in pairs),
        groups=_groups(pairs) if grouped else None,
        origins=_origins(pairs),
    )


def _origins(pairs: Sequence[Pair]) -> tuple[Origin, ...]:
    return tuple(origin for pair in pairs for origin in pair.origins)


def _groups(pairs: Sequence[Pair]) -> TokenGroups:
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
    return TokenGroups(torch.cat(ours), torch.cat(theirs), torch.cat([torch.empty(0, dtype=torch.int64), *targets]))


def _needs_dummy(processor: Processor, rows: list[Encoded]) -> bool:
    return not rows or (processor.has_vision and not any(row.images for row in rows))


def _rows(processor: Processor, samples: list[Encoded], tokens: list[Tensor], shared: list[bool]) -> ModelBatch:
    """Samples in rows, those that share rows packed.

    A shared row is no longer than the longest sample, so that packing saves padding and costs nothing: attention by a
    mask grows with a row's square. A variable-length kernel does not, and gets one row.

    Args:
        processor: of the model.
        samples: those of the pairs, and perhaps a dummy.
        tokens: of each pair, the places of its supervised tokens.
        shared: of each sample, whether it may stand in a row with others.
    """
    together = [number for number in range(len(samples)) if shared[number]]
    lengths = [len(sample.input_ids) for sample in samples]
    limit = sum(lengths) if processor.one_row else max(lengths)
    rows = [[number] for number in range(len(samples)) if not shared[number]]
    rows += [[together[i] for i in row] for row in pack([lengths[number] for number in together], limit)]
    inputs = processor.collate(
        [processor.join([samples[i] for i in row]) if shared[row[0]] else samples[row[0]] for row in rows]
    )
    nothing = torch.empty(0, dtype=torch.int64)

    def among_the_rows(counts: list[int]) -> Tensor:
        """Where what each of the pairs' samples has so many of stands, counted through the rows."""
        starts, seen = [0] * len(samples), 0
        for i in chain.from_iterable(rows):
            starts[i], seen = seen, seen + counts[i]
        return torch.cat([nothing, *(starts[i] + torch.arange(counts[i]) for i in range(len(tokens)))])

    # Where each sample begins in the flattened rows.
    starts = [0] * len(samples)
    for number, row in enumerate(rows):
        place = number * inputs["input_ids"].shape[1]
        for i in row:
            starts[i], place = place, place + lengths[i]
    return ModelBatch(
        inputs,
        torch.cat([nothing, *(starts[i] + places - 1 for i, places in enumerate(tokens))]),
        among_the_rows([sample.images for sample in samples]),
        among_the_rows([int(processor.image_tokens(sample).sum()) if sample.images else 0 for sample in samples]),
        sum(lengths),
    )


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of sequences, put together into rows of at most ``limit`` tokens: the longest first, each into the first
    row that has room for it (first-fit-decreasing).
    """
    rows: list[list[int]] = []
    used: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((row for row, taken in enumerate(used) if taken + lengths[number] <= limit), len(rows))
        if place == len(rows):
            rows.append([])
            used.append(0)
        rows[place].append(number)
        used[place] += lengths[number]
    return rows
