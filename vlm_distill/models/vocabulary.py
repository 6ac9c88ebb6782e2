"""What two models must share for their token distributions to be compared: the same tokens under the same ids."""

from __future__ import annotations

from typing import Any, Protocol

from data.errors import UserError

from .interface import LMHead, VisionLanguageModel


class HasTokens(Protocol):
    """What is needed of a model, or of a teacher with a head, to compare and cut its vocabulary."""

    @property
    def head(self) -> LMHead: ...
    @property
    def processor(self) -> Any: ...


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> int:
    """n: ids 0..n−1 are the same tokens in both tokenizers.

    Beyond n either tokenizer may have tokens that were added to it (an image token, say); any other difference means
    that the two do not speak the same language.

    Raises:
        UserError: a difference among tokens of which at least one is of the vocabulary proper; it shows the first.
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
    """Whether two tokenizers are the same but for added tokens."""
    try:
        shared_vocabulary(student_tokenizer, teacher_tokenizer)
    except UserError:
        return False
    return True


def separate_heads(*models: HasTokens) -> None:
    """Cuts each model's head to the ids that its own tokenizer has: what embeddings are padded with is no token."""
    for model in models:
        model.head.vocabulary = None
        with model.head.weight() as weight:
            model.head.vocabulary = min(max(model.processor.tokenizer.get_vocab().values()) + 1, weight.shape[0])


def align_heads(student: VisionLanguageModel, teacher: HasTokens) -> int:
    """Cuts both heads to the ids that both models share, and returns their number.

    Raises:
        UserError: different tokenizers, or an end token of the student outside what they share.
    """
    teacher.head.vocabulary = None
    with teacher.head.weight() as weight:
        n = cut_head(student, teacher.processor.tokenizer, weight.shape[0])
    teacher.head.vocabulary = n
    return n


def cut_head(student: VisionLanguageModel, teacher_tokenizer: Any, known: int | None = None) -> int:
    """Cuts the student's head to the ids that it shares with a teacher, and returns their number.

    Args:
        student: the student.
        teacher_tokenizer: the teacher's.
        known: ids of which the teacher has logits; ``None``: those of its tokenizer.

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
