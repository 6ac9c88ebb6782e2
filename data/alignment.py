"""Which tokens of two models spell the same text, where their tokenizers differ."""

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
    """A supervised token: its number among them, and where in its answer's text it begins and ends."""

    number: int
    start: int
    stop: int
    end: bool


def group_tokens(student: Encoded, teacher: Encoded, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Cuts both models' answers wherever both have a boundary between tokens.

    A boundary lies where a token ends and the next one begins at or after that character: pieces of one character,
    which byte-level tokenizers make, overlap and have none between them. Boundaries of both models meet at the same
    character, or else in the same white space, which some tokenizers write with the word after it, some with the word
    before, and some not at all: "blue | green" meets "blue|  green". What a template puts around an answer counts as
    white space. The first end tokens of both models meet, whatever they are.

    Args:
        student: with ``places``.
        teacher: with ``places``.
        answers: the text of each answer.

    Returns:
        int64 ``[G, 2]`` for the student and for the teacher: number of a group's first supervised token, and the one
        after its last. Tokens in no group: end tokens beyond the first, or where the other model has none, and an
        answer's beginning where only one model's tokens cover it.

    Raises:
        BadSample: an answer has no token in one of the models.
    """
    ours, theirs = _by_answer("student", student, len(answers)), _by_answer("teacher", teacher, len(answers))
    pairs = [pair for text, a, b in zip(answers, ours, theirs, strict=True) for pair in _groups(text, a, b)]
    groups = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2, 2)
    return groups[:, 0], groups[:, 1]


def _by_answer(role: str, row: Encoded, count: int) -> list[list[_Token]]:
    assert row.places is not None, f"the {role}'s processor does not say where its tokens stand in the answers"
    answers: list[list[_Token]] = [[] for _ in range(count)]
    ends = row.ends[row.supervised].tolist()
    for number, ((answer, start, stop), end) in enumerate(zip(row.places.tolist(), ends, strict=True)):
        answers[answer].append(_Token(number, start, stop, end))
    for number, tokens in enumerate(answers, 1):
        if all(token.end for token in tokens):
            raise BadSample("misaligned", f"answer {number}: no token for the {role}")
    return answers


Group = tuple[tuple[int, int], tuple[int, int]]


def _groups(text: str, student: list[_Token], teacher: list[_Token]) -> Iterator[Group]:
    """One answer's groups."""
    both_end = all(any(token.end for token in tokens) for tokens in (student, teacher))
    ours, theirs = _compared(student, both_end), _compared(teacher, both_end)
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
