"""Which tokens of two models are compared: the same ones, or groups that spell the same text."""

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
    """A supervised token: its number among them, its id, and where in its piece of text it begins and ends."""

    number: int
    id: int
    start: int
    stop: int
    end: bool


def match_tokens(student: Encoded, teacher: Encoded, pieces: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Find for each of the student's supervised tokens the teacher's, where both have one tokenizer.

    Tokens match that have the same id at the same place in the answers. An answer's own tokens must all match, but for
    those of its first or last word where a template's blank, joined to that word, made other tokens of it in one model.
    What only one template writes, and a thought that only one shows, has no counterpart. End tokens match in order.

    Args:
        student: with ``places``.
        teacher: with ``places``.
        pieces: the texts that the places refer to.

    Returns:
        int64 ``[n]`` indices in the student's row; int64 ``[n]`` in the teacher's row, any of its supervised tokens
        where none matches; bool ``[n]``, whether one does.

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
    own, others = (row.supervised.nonzero().flatten() for row in (student, teacher))
    numbers = [matches.get(number, len(others) - 1) for number in range(len(own))]
    distilled = torch.tensor([number in matches for number in range(len(own))], dtype=torch.bool)
    return own, others[numbers], distilled


def _by_piece(role: str, row: Encoded) -> dict[int, list[_Token]]:
    assert row.spans is not None, f"the {role}'s processor does not say where its tokens stand in the answers"
    found: dict[int, list[_Token]] = {}
    ids, ends = row.input_ids[row.supervised].tolist(), row.ends[row.supervised].tolist()
    for number, (token, (piece, start, stop), end) in enumerate(zip(ids, row.spans.tolist(), ends, strict=True)):
        found.setdefault(piece, []).append(_Token(number, token, start, stop, end))
    return found


def _matches(ours: list[_Token], theirs: list[_Token]) -> dict[int, int]:
    """Numbers of tokens with the same id at the same place, and of end tokens with the same id, in order."""
    waiting: dict[tuple[int, int, int], list[int]] = {}
    for token in reversed([token for token in theirs if not token.end]):
        waiting.setdefault((token.id, token.start, token.stop), []).append(token.number)
    found = {}
    for token in ours:
        same = waiting.get((token.id, token.start, token.stop))
        if same and not token.end:
            found[token.number] = same.pop()
    ends = ([token for token in tokens if token.end] for tokens in (ours, theirs))
    return found | {a.number: b.number for a, b in zip(*ends, strict=False) if a.id == b.id}


def _check_text(piece: int, text: str, ours: list[_Token], theirs: list[_Token], found: dict[int, int]) -> None:
    """Raise ``BadSample`` where a text's own tokens differ for another reason than a template's blank."""
    mine, other = ([token for token in tokens if not token.end] for tokens in (ours, theirs))
    thought = piece % 2 == 0
    if not mine or not other:
        if bool(mine) != bool(other) and not thought:
            role = "teacher" if mine else "student"
            raise BadSample("misaligned", f"answer {piece // 2 + 1}: no token for the {role}")
        return
    words = text.split()
    first_word, last_word = (len(words[0]), len(text) - len(words[-1])) if words else (0, 0)
    # A blank of the template's, or one that it trims, is part of the outermost token of one model alone.
    opens_alike, closes_alike = mine[0].start == other[0].start, mine[-1].stop == other[-1].stop
    for tokens, known in ((mine, found.keys()), (other, set(found.values()))):
        for token in tokens:
            excused = (not opens_alike and token.start < first_word) or (not closes_alike and token.stop > last_word)
            if token.number not in known and not excused:
                difference = difference_of([token.id for token in mine], [token.id for token in other])
                raise BadSample("misaligned", f"answer {piece // 2 + 1}: {difference}")


def difference_of(student: list[int], teacher: list[int]) -> str:
    """Say where two lists of ids differ first."""
    for k, (mine, other) in enumerate(zip(student, teacher, strict=False), 1):
        if mine != other:
            return f"token {k} is {mine} for the student, {other} for the teacher"
    return f"{len(student)} tokens for the student, {len(teacher)} for the teacher"


def group_tokens(student: Encoded, teacher: Encoded, pieces: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Cut both models' answers wherever both have a boundary between tokens.

    A boundary lies where a token ends and the next one begins at or after that character: pieces of one character,
    which byte-level tokenizers make, overlap and have none between them. Boundaries of both models meet at the same
    character, or else in the same white space, which some tokenizers write with the word after it, some with the word
    before, and some not at all: "blue | green" meets "blue|  green". The first end tokens of both models meet, whatever
    they are.

    Args:
        student: with ``places``.
        teacher: with ``places``.
        pieces: the texts that the places refer to.

    Returns:
        int64 ``[G, 2]`` for the student and for the teacher: number of a group's first supervised token, and the one
        after its last. Tokens in no group: end tokens beyond the first, or where the other model has none; an answer's
        beginning where only one model's tokens cover it; what a template writes beside blanks; a thought that only one
        model is shown.

    Raises:
        BadSample: an answer has no token in one of the models.
    """
    ours, theirs = _by_piece("student", student), _by_piece("teacher", teacher)
    found: list[Group] = []
    for piece in sorted(number for number in ours.keys() | theirs.keys() if number >= 0):
        mine, other = ours.get(piece, []), theirs.get(piece, [])
        silent = [
            role
            for role, tokens in (("student", mine), ("teacher", other))
            if all(token.end for token in tokens) and pieces[piece]
        ]
        if silent and piece % 2 and len(silent) < 2:
            raise BadSample("misaligned", f"answer {piece // 2 + 1}: no token for the {silent[0]}")
        if mine and other:
            found += _groups(pieces[piece], mine, other)
    groups = torch.tensor(found, dtype=torch.int64).reshape(-1, 2, 2)
    return groups[:, 0], groups[:, 1]


Group = tuple[tuple[int, int], tuple[int, int]]


def _groups(text: str, student: list[_Token], teacher: list[_Token]) -> Iterator[Group]:
    """One text's groups."""
    both_end = all(any(token.end for token in tokens) for tokens in (student, teacher))
    ours, theirs = _compared(student, both_end), _compared(teacher, both_end)
    if not ours or not theirs:
        return
    before = [0, *accumulate(not character.isspace() for character in text)]

    def gap(place: int) -> int:
        """The white space around a place, by how many other characters come before."""
        return before[min(max(place, 0), len(text))]

    cuts = [(0, 0), *_meetings(_boundaries(ours), _boundaries(theirs), gap), (len(ours), len(theirs))]
    if gap(ours[0].start) != gap(theirs[0].start):
        cuts = cuts[1:]
    for (a, b), (c, d) in pairwise(cuts):
        yield (ours[a].number, ours[c - 1].number + 1), (theirs[b].number, theirs[d - 1].number + 1)


def _compared(tokens: list[_Token], with_end: bool) -> list[_Token]:
    """An answer's own tokens, and with them its first end token."""
    own = [token for token in tokens if not token.end]
    return own + [token for token in tokens if token.end][:1] if with_end else own


def _boundaries(tokens: list[_Token]) -> list[tuple[int, int]]:
    """The number of the token after each boundary, and its place."""
    return [(i, a.stop) for i, (a, b) in enumerate(pairwise(tokens), 1) if b.start >= a.stop]


def _meetings(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]], gap: Callable[[int], int]
) -> Iterator[tuple[int, int]]:
    """Boundaries that meet, as the numbers of the tokens after them: at the same place, or once in the same gap."""
    by_gap: dict[int, dict[int, int]] = {}
    for i, place in theirs:
        by_gap.setdefault(gap(place), {}).setdefault(place, i)
    for key, group in groupby(ours, key=lambda boundary: gap(boundary[1])):
        here, there = {place: i for i, place in reversed(list(group))}, by_gap.get(key, {})
        same = sorted(here.keys() & there.keys())
        if same:
            yield from ((here[place], there[place]) for place in same)
        elif there:
            yield here[min(here)], there[min(there)]
