"""Compare two models' vocabularies, and cut both lm heads to the tokens that they share."""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

import torch
from torch import Tensor

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


def shared_tokens(student_tokenizer: Any, teacher_tokenizer: Any, most: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the ids of the tokens that spell the same bytes in both vocabularies, ascending for the student.

    Special tokens are shared if they have the same name; the two end-of-sequence tokens always are. Of several tokens
    that spell the same, the first counts.

    Args:
        student_tokenizer: the student's.
        teacher_tokenizer: the teacher's.
        most: numbers of ids that the two heads score.

    Returns:
        int64 ``[K]`` for the student and for the teacher.
    """
    ours, theirs = _ids_by_spelling(student_tokenizer, most[0]), _ids_by_spelling(teacher_tokenizer, most[1])
    pairs = sorted((number, theirs[spelling]) for spelling, number in ours.items() if spelling in theirs)
    ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def _ids_by_spelling(tokenizer: Any, most: int) -> dict[bytes | str, int]:
    """Return token ids below ``most`` by the bytes that they spell, special tokens by their names."""
    byte_level = _is_byte_level(tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    found: dict[bytes | str, int] = {}
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(most, len(tokenizer)))))):
        if token is None:
            continue
        if number == tokenizer.eos_token_id:
            found.setdefault("end of sequence", number)
        elif number in special:
            found.setdefault(token, number)
        else:
            found.setdefault(_spelling(token, byte_level), number)
    return found


def _is_byte_level(tokenizer: Any) -> bool:
    """Return whether a tokenizer writes its tokens in the alphabet of GPT-2, a character for each byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    described = json.loads(backend.to_str())
    return "ByteLevel" in json.dumps([described["pre_tokenizer"], described["decoder"]])


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of GPT-2's alphabet means."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _spelling(token: str, byte_level: bool) -> bytes:
    """Return the bytes that a token spells."""
    if byte_level and all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    single = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    if single:
        return bytes([int(single[1], 16)])
    return token.replace("▁", " ").encode()


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
