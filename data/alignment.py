"""Align the supervised tokens of two models: the same tokens, or groups of tokens that spell the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from .batch import Encoded
from .errors import BadSample


@dataclass(frozen=True)
class _Token:
    """A supervised token: its index among the supervised tokens, its id, and its span in its piece of text."""

    number: int
    id: int
    start: int
    stop: int
    end: bool


def match_tokens(student: Encoded, teacher: Encoded, pieces: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Match each of the student's supervised tokens with the teacher's, for models with the same tokenizer.

    Tokens match if they have the same id and the same span. All of an answer's own tokens must match, except in its
    first or last word, whose tokens may differ if one template's white space merges with it. Text that
    only one template writes, and a thought that only one shows, has no counterpart. End tokens match in order.

    Args:
        student, teacher: with ``spans``.
        pieces: the texts that the spans refer to.

    Returns:
        int64 ``[n]``, indices of the student's supervised tokens; int64 ``[n]``, indices of the teacher's (an arbitrary
        supervised one if none matches); bool ``[n]``, whether one matches.

    Raises:
        BadSample: the answers differ.
    """
    ours, theirs = _by_piece("student", student), _by_piece("teacher", teacher)
    matches: dict[int, int] = {}
    for piece in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(piece, []), theirs.get(piece, [])
        found = _matches(mine, other)
        if piece >= 0:
            _check_text(piece, pieces[piece], mine, other, found)
        matches |= found
    own, others = (encoded.supervised.nonzero().flatten() for encoded in (student, teacher))
    numbers = [matches.get(number, len(others) - 1) for number in range(len(own))]
    distilled = torch.tensor([number in matches for number in range(len(own))], dtype=torch.bool)
    return own, others[numbers], distilled


def _by_piece(role: str, encoded: Encoded) -> dict[int, list[_Token]]:
    """Return the supervised tokens of each piece of text."""
    assert encoded.spans is not None, f"the {role}'s processor gives no spans"
    found: dict[int, list[_Token]] = {}
    ids, ends = encoded.input_ids[encoded.supervised].tolist(), encoded.ends[encoded.supervised].tolist()
    for number, (token, (piece, start, stop), end) in enumerate(zip(ids, encoded.spans.tolist(), ends, strict=True)):
        found.setdefault(piece, []).append(_Token(number, token, start, stop, end))
    return found


def _matches(ours: list[_Token], theirs: list[_Token]) -> dict[int, int]:
    """Match the numbers of tokens with the same id and span, and of end tokens with the same id, in order."""
    waiting: dict[tuple[int, int, int], list[int]] = {}
    for token in reversed([token for token in theirs if not token.end]):
        waiting.setdefault((token.id, token.start, token.stop), []).append(token.number)
    found = {}
    for token in ours:
        same = waiting.get((token.id, token.start, token.stop))
        if same and not token.end:
            found[token.number] = same.pop()
    our_ends, their_ends = [token for token in ours if token.end], [token for token in theirs if token.end]
    return found | {a.number: b.number for a, b in zip(our_ends, their_ends, strict=False) if a.id == b.id}


def _check_text(piece: int, text: str, ours: list[_Token], theirs: list[_Token], found: dict[int, int]) -> None:
    """Raise ``BadSample`` if a text's own tokens differ, unless white space of a template explains it."""
    mine, other = [token for token in ours if not token.end], [token for token in theirs if not token.end]
    thought = piece % 2 == 0
    if not mine or not other:
        if bool(mine) != bool(other) and not thought:
            role = "teacher" if mine else "student"
            raise BadSample("misaligned", f"answer {piece // 2 + 1}: no token for the {role}")
        return
    words = text.split()
    first_word, last_word = (len(words[0]), len(text) - len(words[-1])) if words else (0, 0)
    # White space that one template writes or trims is part of the outermost token of one model only.
    opens_alike, closes_alike = mine[0].start == other[0].start, mine[-1].stop == other[-1].stop
    for tokens, known in ((mine, found.keys()), (other, set(found.values()))):
        for token in tokens:
            excused = (not opens_alike and token.start < first_word) or (not closes_alike and token.stop > last_word)
            if token.number not in known and not excused:
                difference = difference_of([token.id for token in mine], [token.id for token in other])
                raise BadSample("misaligned", f"answer {piece // 2 + 1}: {difference}")


def difference_of(student: list[int], teacher: list[int]) -> str:
    """Describe the first difference between two lists of ids."""
    for k, (mine, other) in enumerate(zip(student, teacher, strict=False), 1):
        if mine != other:
            return f"token {k} is {mine} for the student, {other} for the teacher"
    return f"{len(student)} tokens for the student, {len(teacher)} for the teacher"


def group_tokens(student: Encoded, teacher: Encoded, pieces: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Group tokens that spell the same text: cut both answers wherever both models have a token boundary.

    There is a boundary where a token ends and the next one begins at or after that character. (Byte-level tokenizers
    may split a character; its tokens overlap and have no boundary between them.) Two boundaries match at the same
    character, or else within the same white space, which some tokenizers attach to the next word, some to the previous
    one, and some drop. The first end tokens of both models match, whatever they are.

    Example: the answer ``red green``, which the student encodes as ``re|d| green|<end>`` and the teacher as
    ``r|ed |gree|n|</s>``. Both have a boundary in the white space between the words and one before the end token::

        student   re  d | ␣green | <end>       tokens 0 1 | 2   | 3
        teacher   r  ed␣ | gree n | </s>       tokens 0 1 | 2 3 | 4

        group_tokens(student, teacher, ["", "red green"])
        # student: [[0, 2], [2, 3], [3, 4]]
        # teacher: [[0, 2], [2, 4], [4, 5]]

    Args:
        student, teacher: with ``spans``.
        pieces: the texts that the spans refer to.

    Returns:
        int64 ``[G, 2]`` for the student and for the teacher: the number of a group's first supervised token, and of its
        last + 1. These tokens are in no group: end tokens after the first, or that the other model lacks; an answer's
        beginning that only one model's tokens cover; text of a template other than white space; a thought that only one
        model is shown.

    Raises:
        BadSample: an answer has no token in one of the models.
    """
    ours, theirs = _by_piece("student", student), _by_piece("teacher", teacher)
    found: list[Group] = []
    for piece in sorted(number for number in ours.keys() | theirs.keys() if number >= 0):
        mine, other = ours.get(piece, []), theirs.get(piece, [])
        # Odd pieces are answers; a thought may be missing from one model.
        if piece % 2 and pieces[piece]:
            _check_both_have_tokens(piece, mine, other)
        if mine and other:
            found += _groups(pieces[piece], mine, other)
    groups = torch.tensor(found, dtype=torch.int64).reshape(-1, 2, 2)
    return groups[:, 0], groups[:, 1]


Group = tuple[tuple[int, int], tuple[int, int]]


def _check_both_have_tokens(piece: int, student: list[_Token], teacher: list[_Token]) -> None:
    """Raise ``BadSample`` if exactly one of the models has no token of an answer but end tokens."""
    student_has_none = all(token.end for token in student)
    teacher_has_none = all(token.end for token in teacher)
    if student_has_none != teacher_has_none:
        role = "student" if student_has_none else "teacher"
        raise BadSample("misaligned", f"answer {piece // 2 + 1}: no token for the {role}")


def _groups(text: str, student: list[_Token], teacher: list[_Token]) -> Iterator[Group]:
    """Yield the groups of one text."""
    both_end = any(token.end for token in student) and any(token.end for token in teacher)
    ours, theirs = _compared(student, both_end), _compared(teacher, both_end)
    if not ours or not theirs:
        return
    before = [0, *accumulate(not character.isspace() for character in text)]

    def gap(character: int) -> int:
        """Identify the white space around a character by the number of other characters before it."""
        return before[min(max(character, 0), len(text))]

    cuts = [(0, 0), *_matching(_boundaries(ours), _boundaries(theirs), gap), (len(ours), len(theirs))]
    if gap(ours[0].start) != gap(theirs[0].start):
        cuts = cuts[1:]
    for (a, b), (c, d) in pairwise(cuts):
        yield (ours[a].number, ours[c - 1].number + 1), (theirs[b].number, theirs[d - 1].number + 1)


def _compared(tokens: list[_Token], with_end: bool) -> list[_Token]:
    """Return an answer's own tokens, and with ``with_end`` its first end token."""
    own = [token for token in tokens if not token.end]
    return own + [token for token in tokens if token.end][:1] if with_end else own


def _boundaries(tokens: list[_Token]) -> list[tuple[int, int]]:
    """Return each boundary: the number of the token after it, and its character."""
    return [(i, a.stop) for i, (a, b) in enumerate(pairwise(tokens), 1) if b.start >= a.stop]


def _matching(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]], gap: Callable[[int], int]
) -> Iterator[tuple[int, int]]:
    """Yield matching boundaries, as the numbers of the tokens after them: at the same character, or one per gap."""
    by_gap: dict[int, dict[int, int]] = {}
    for i, character in theirs:
        by_gap.setdefault(gap(character), {}).setdefault(character, i)
    for key, group in groupby(ours, key=lambda boundary: gap(boundary[1])):
        here, there = {character: i for i, character in reversed(list(group))}, by_gap.get(key, {})
        same = sorted(here.keys() & there.keys())
        if same:
            for character in same:
                yield here[character], there[character]
        elif there:
            yield here[min(here)], there[min(there)]
