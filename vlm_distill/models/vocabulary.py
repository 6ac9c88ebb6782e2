"""Compare two models' vocabularies, and cut both lm heads to the tokens that they share."""

from __future__ import annotations

from typing import Any, Protocol

from data.errors import UserError

from .interface import VisionLanguageModel
from .lm_head import LMHead


class HasTokens(Protocol):
    """A model, or a teacher with a head, whose vocabulary can be compared and cut."""

    @property
    def head(self) -> LMHead: ...
    @property
    def processor(self) -> Any: ...


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> int:
    """Return n such that ids 0..n−1 are the same tokens in both tokenizers.

    Beyond n, either may have added tokens only (an image token, say); any other difference makes them incomparable.

    Raises:
        UserError: the vocabularies proper differ; the message shows the first difference.
    """
    student = student_tokenizer.convert_ids_to_tokens(list(range(len(student_tokenizer))))
    teacher = teacher_tokenizer.convert_ids_to_tokens(list(range(len(teacher_tokenizer))))
    pairs = zip(student, teacher, strict=False)
    n = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(student), len(teacher)))
    for tokens, tokenizer in ((student, student_tokenizer), (teacher, teacher_tokenizer)):
        added = tokenizer.added_tokens_decoder
        if all(i in added for i in range(n, len(tokens))):
            continue
        a, b = (repr(t[n]) if n < len(t) else "no token" for t in (student, teacher))
        raise UserError(
            f"student and teacher need the same tokenizer: id {n} is {a} for the student and {b} for the teacher; "
            "choose a student with the teacher's tokenizer"
        )
    return n


def same_tokens(student_tokenizer: Any, teacher_tokenizer: Any) -> bool:
    """Return whether two tokenizers differ in added tokens only."""
    try:
        shared_vocabulary(student_tokenizer, teacher_tokenizer)
    except UserError:
        return False
    return True


def separate_heads(*models: HasTokens) -> None:
    """Cut each model's head to the ids of its own tokenizer; padding of the embeddings is not a token."""
    for model in models:
        model.head.vocabulary = None
        with model.head.weight() as weight:
            model.head.vocabulary = min(max(model.processor.tokenizer.get_vocab().values()) + 1, weight.shape[0])


def align_heads(student: VisionLanguageModel, teacher: HasTokens) -> int:
    """Cut both heads to the ids that both models share, and return their number.

    Raises:
        UserError: the tokenizers differ, or an end token of the student is not shared.
    """
    teacher.head.vocabulary = None
    with teacher.head.weight() as weight:
        n = cut_head(student, teacher.processor.tokenizer, weight.shape[0])
    teacher.head.vocabulary = n
    return n


def cut_head(student: VisionLanguageModel, teacher_tokenizer: Any, known: int | None = None) -> int:
    """Cut the student's head to the ids that it shares with a teacher, and return their number.

    Args:
        student: the student.
        teacher_tokenizer: the teacher's.
        known: number of ids that the teacher has logits for; ``None``: those of its tokenizer.

    Raises:
        UserError: as :func:`align_heads`.
    """
    n = shared_vocabulary(student.processor.tokenizer, teacher_tokenizer)
    student.head.vocabulary = None
    with student.head.weight() as weight:
        n = min(n, weight.shape[0], n if known is None else known)
    outside = sorted(i for i in student.end_tokens if i >= n)
    if outside:
        token = student.processor.tokenizer.convert_ids_to_tokens(outside[0])
        raise UserError(
            f"student's end token {token!r} (id {outside[0]}) is not among the {n} tokens it shares with the teacher; "
            "choose a student with the teacher's tokenizer"
        )
    student.head.vocabulary = n
    return n
