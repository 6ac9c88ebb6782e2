"""Encode a sample for student and teacher, and align their supervised tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from .alignment import difference_of, group_tokens, match_tokens
from .attempts import attempt, checked
from .batch import Encoded, Origin, Processor
from .conversation import Conversation, Document, answer_pieces, count_images, is_answer
from .errors import BadSample
from .teacher_view import Seen, View


@dataclass(frozen=True)
class Turns:
    """Which answers of a conversation are trained on, and limits on their length.

    Attributes:
        last_only: train on the last supervised answer; earlier ones are context.
        split: make each supervised answer a sample of its own, with everything before it as context.
        max_prompt: the most tokens before the last answer, in either model; ``None`` for no limit.
        max_response: the most tokens of the last answer, end tokens included; ``None`` for no limit.
        ends: whether end tokens are supervised (not those that a template writes after a truncated answer).
    """

    last_only: bool = False
    split: bool = False
    max_prompt: int | None = None
    max_response: int | None = None
    ends: bool = True

    def parts(
        self, conversation: Conversation, images: Sequence[Image.Image]
    ) -> list[tuple[Conversation, Sequence[Image.Image]]]:
        """Return the conversations to encode: the whole one, or with ``split`` one up to each supervised answer.

        Raises:
            BadSample: with ``split``, no answer is supervised.
        """
        if not self.split:
            return [(conversation, images)]
        answers = [k for k, message in enumerate(conversation.messages) if is_answer(message)]
        if not answers:
            raise BadSample("no supervised token", "every answer is masked")
        if self.last_only:
            answers = answers[-1:]
        found = []
        for k in answers:
            messages = conversation.messages[: k + 1]
            count = count_images(messages)
            part = replace(conversation, messages=messages, images=conversation.images[:count])
            found.append((part, images[:count]))
        return found


EVERY_ANSWER = Turns()


@dataclass
class Pair:
    """One conversation, or one piece of a document, encoded for both models.

    Attributes:
        student: as the student receives it.
        teacher: as the teacher receives it; ``None`` when training without one.
        student_tokens: int64 ``[n]``, indices of the student's supervised tokens.
        teacher_tokens: int64 ``[n]``, indices of the teacher's tokens aligned with them; equal to ``student_tokens``
            without a teacher. With ``groups``: ``[m]``, indices of all supervised tokens of the teacher.
        distilled: bool ``[n]``; false where student and teacher expect different end tokens, or in no group.
        groups: int64 ``[G, 2]`` for each model, as returned by :func:`~data.alignment.group_tokens`.
        samples: number of samples that begin here: 0 for further answers or pieces of one sample.
        document: whether it is plain text, which is always packed with other plain text.
        origins: the sample it comes from; empty if not needed.
        taught: with several teachers, by name the pair with each of those that teach this sample; ``teacher`` is None.
        source: with several teachers, the number of the sample's source.
        seen: what the teacher sees, if it reads that instead of tokens, and there are several teachers or the student
            drew the answer.
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
    taught: Mapping[str, Pair] = field(default_factory=dict)
    source: int = 0
    seen: tuple[Conversation | Document, Sequence[Image.Image]] | None = None


@dataclass(frozen=True)
class Part:
    """What becomes one pair: a conversation, or the beginning of one up to an answer.

    Attributes:
        conversation: its messages.
        images: its images, decoded.
        teacher: what encodes it for the teacher, if there is one; a cached teacher has one for each part.
        seen: what the teacher sees, if not the same; its answers are the same.
    """

    conversation: Conversation
    images: Sequence[Image.Image]
    teacher: Processor | None
    seen: Seen | None = None


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
    seen: Seen | None = None,
) -> Pair:
    """Encode a conversation for both models, as :func:`encode_pairs` does. Raise ``BadSample`` if that fails."""
    part = Part(conversation, images, teacher, seen)
    return checked(encode_pairs([part], student, max_length, turns=turns, grouped=grouped, role=role)[0])


def encode_pairs(
    parts: Sequence[Part],
    student: Processor,
    max_length: int,
    *,
    turns: Turns = EVERY_ANSWER,
    grouped: bool = False,
    role: str = "student",
) -> list[Pair | BadSample]:
    """Encode conversations for both models and align their supervised tokens.

    The answers' own tokens must have the same ids in both models (:func:`~data.alignment.match_tokens`). Where the end
    tokens or the template's text differ, the student's token stays supervised but is not distilled; tokens that only
    the teacher has are left out. With different tokenizers, tokens that spell the same text are grouped.

    Args:
        parts: the conversations. One whose teacher is the student's processor, and sees the same, is encoded once.
        student: the student's processor.
        max_length: the most tokens for either model, image tokens included.
        turns: which answers are trained on, and further limits.
        grouped: whether the models have different tokenizers.
        role: the first model's role, for errors.

    Returns:
        A pair for each part, or why it is a bad sample: it is too long for one of the models (nothing is ever
        truncated), has no supervised token or begins with one, or its answers differ between the models.
    """
    if not parts:
        return []
    encoded = student.encode_all([(part.conversation, part.images) for part in parts])
    ours = [attempt(_supervised, role, row, max_length, turns) for row in encoded]

    # Ask each teacher once for all of its parts that the student can take.
    by_teacher: dict[int, list[int]] = {}
    for number, (part, mine) in enumerate(zip(parts, ours, strict=True)):
        once = part.teacher is student and part.seen is None and not grouped
        if part.teacher is not None and not once and isinstance(mine, Encoded):
            by_teacher.setdefault(id(part.teacher), []).append(number)
    theirs: dict[int, Encoded | BadSample] = {}
    for numbers in by_teacher.values():
        teacher = parts[numbers[0]].teacher
        assert teacher is not None
        seen = [parts[number].seen or (parts[number].conversation, parts[number].images) for number in numbers]
        encoded = teacher.encode_all(seen)
        for number, row in zip(numbers, encoded, strict=True):
            theirs[number] = attempt(_supervised, "teacher", row, max_length, turns)

    return [
        attempt(_pair, part, mine, theirs.get(number), grouped)
        for number, (part, mine) in enumerate(zip(parts, ours, strict=True))
    ]


def _pair(part: Part, student: Encoded | BadSample, teacher: Encoded | BadSample | None, grouped: bool) -> Pair:
    """Align a part's encodings. Raise ``BadSample`` if one of them is bad, or if they differ.

    Without the teacher's, the student's serves both models if there is a teacher.
    """
    ours = checked(student)
    if teacher is None:
        tokens = ours.supervised.nonzero().flatten()
        shared = None if part.teacher is None else ours
        return Pair(ours, shared, tokens, tokens, torch.ones(len(tokens), dtype=torch.bool))
    theirs = checked(teacher)
    pieces = answer_pieces(part.conversation.messages)
    if grouped:
        return _grouped_pair(ours, theirs, pieces)
    return Pair(ours, theirs, *match_tokens(ours, theirs, pieces))


def _supervised(role: str, result: Encoded | BadSample, max_length: int, turns: Turns) -> Encoded:
    """Return a model's encoding with the tokens supervised that are trained on.

    Raises:
        BadSample: the encoding is bad, is longer than a limit, or has nothing to learn.
    """
    encoded = checked(result)
    if len(encoded.input_ids) > max_length:
        raise BadSample("too long", f"{len(encoded.input_ids)} tokens for the {role}, limit {max_length}")
    if not encoded.supervised.any():
        raise BadSample("no supervised token", f"the {role}'s template marks none")
    if encoded.supervised[0]:
        raise BadSample("first token is supervised", f"nothing predicts the {role}'s first token")
    if turns != EVERY_ANSWER:
        encoded = _chosen_turns(role, encoded, turns)
    return encoded


def _chosen_turns(role: str, encoded: Encoded, turns: Turns) -> Encoded:
    """Return the encoding with the answers supervised that ``turns`` chooses. Raise ``BadSample`` beyond its limits."""
    last = _last_answer(encoded)
    for part, length, limit in (
        ("before the last answer", last[0], turns.max_prompt),
        ("in the last answer", len(last), turns.max_response),
    ):
        if limit is not None and length > limit:
            raise BadSample("too long", f"{length} tokens {part} for the {role}, limit {limit}")

    if turns.last_only or turns.split:
        encoded = _supervise_from(encoded, last[0])
    return encoded if turns.ends else _without_ends(encoded)


def _last_answer(encoded: Encoded) -> list[int]:
    """Return the indices of the last answer's tokens, end tokens included.

    An answer ends where supervision stops, or where another token follows an end token.
    """
    ends = encoded.ends.tolist()
    supervised = encoded.supervised.nonzero().flatten().tolist()
    start = len(supervised) - 1
    while start > 0:
        before, first = supervised[start - 1], supervised[start]
        if before + 1 != first or (ends[before] and not ends[first]):
            break
        start -= 1
    return supervised[start:]


def _supervise_from(encoded: Encoded, start: int) -> Encoded:
    """Return the same tokens, supervised from index ``start`` on."""
    later = torch.arange(len(encoded.input_ids)) >= start
    spans = encoded.spans
    if spans is not None:
        spans = spans[encoded.supervised.nonzero().flatten() >= start]
    return replace(encoded, supervised=encoded.supervised & later, ends=encoded.ends & later, spans=spans)


def _without_ends(encoded: Encoded) -> Encoded:
    """Return the same tokens with end tokens not supervised."""
    kept = ~encoded.ends[encoded.supervised]
    if not kept.any():
        raise BadSample("no supervised token", "the answer is its end token alone")
    spans = None if encoded.spans is None else encoded.spans[kept]
    supervised = encoded.supervised & ~encoded.ends
    return replace(encoded, supervised=supervised, ends=torch.zeros_like(encoded.ends), spans=spans)


def _grouped_pair(student: Encoded, teacher: Encoded, pieces: Sequence[str]) -> Pair:
    """Pair two encodings by different tokenizers."""
    ours, theirs = group_tokens(student, teacher, pieces)
    tokens = student.supervised.nonzero().flatten()
    distilled = torch.zeros(len(tokens), dtype=torch.bool)
    for first, stop in ours.tolist():
        distilled[first:stop] = True
    return Pair(student, teacher, tokens, teacher.supervised.nonzero().flatten(), distilled, (ours, theirs))


def encode_document(document: Document, student: Processor, teacher: Processor | None, max_length: int) -> list[Pair]:
    """Encode plain text for both models, in pieces of at most ``max_length`` tokens. Both must give the same tokens.

    All tokens but each piece's first are supervised and distilled.

    Raises:
        BadSample: the tokenizers differ on it, or there is nothing to learn.
    """
    encoded = student.encode_document(document)
    ids = encoded.input_ids.tolist()
    if teacher is not None and teacher is not student:
        others = teacher.encode_document(document).input_ids.tolist()
        if ids != others:
            raise BadSample("misaligned", difference_of(ids, others))
    pairs: list[Pair] = []
    for piece in _pieces(encoded, max_length):
        tokens = piece.supervised.nonzero().flatten()
        if len(tokens):
            own = None if teacher is None else piece
            every = torch.ones(len(tokens), dtype=torch.bool)
            pairs.append(Pair(piece, own, tokens, tokens, every, samples=int(not pairs), document=True))
    if not pairs:
        raise BadSample("no supervised token", "the document is one token long")
    return pairs


def _pieces(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Cut a document into pieces, whose first token is never supervised."""
    first = torch.arange(len(encoded.input_ids)) % max_length == 0
    supervised = encoded.supervised & ~first
    columns = (encoded.input_ids, supervised, encoded.ends & supervised)
    parts = [column.split(max_length) for column in columns]
    return [Encoded(*part) for part in zip(*parts, strict=True)]


def encode_teacher(
    sample: Conversation | Document,
    images: Sequence[Image.Image],
    teacher: Processor,
    max_length: int,
    turns: Turns = EVERY_ANSWER,
    view: View | None = None,
) -> tuple[list[Pair], Encoded]:
    """Encode a sample for a teacher alone. Return its pairs, and its tokens in the form that a cache keeps.

    With ``view``, that is what the teacher sees of it.

    Raises:
        BadSample: as in :func:`encode_pair` and :func:`encode_document`.
    """
    if isinstance(sample, Document):
        whole = _joined(_pieces(teacher.encode_document(sample), max_length))
        return encode_document(sample, teacher, None, max_length), whole
    pairs: list[Pair] = []
    answers: list[Encoded] = []
    for part, shown in turns.parts(sample, images):
        seen = (part, shown) if view is None else view.of(part, shown)
        pair = encode_pair(*seen, teacher, None, max_length, turns=turns, role="teacher")
        pairs.append(replace(pair, samples=int(not pairs)))
        answers.append(compact(pair.student))
    return pairs, answers[0] if len(answers) == 1 else _joined(answers)


def compact(encoded: Encoded) -> Encoded:
    """Return only the supervised tokens and the token before each run of them."""
    before = torch.cat([encoded.supervised[1:], torch.tensor([False])])
    kept = encoded.supervised | before
    return Encoded(encoded.input_ids[kept], encoded.supervised[kept], encoded.ends[kept], spans=encoded.spans)


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """Concatenate the answers of a conversation or the pieces of a document, as a cache keeps them."""
    spans = [part.spans for part in parts if part.spans is not None]
    return Encoded(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.supervised for part in parts]),
        torch.cat([part.ends for part in parts]),
        spans=torch.cat(spans) if spans else None,
    )
