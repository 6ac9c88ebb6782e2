"""Which boundaries two tokenizations of an answer have in common."""

import pytest
import torch

from data.alignment import group_tokens
from data.batch import Encoded
from data.errors import BadSample


def encoded(*tokens):
    """Supervised tokens as (piece, begin, end), end tokens with a fourth entry."""
    ends = torch.tensor([len(token) > 3 for token in tokens])
    places = torch.tensor([token[:3] for token in tokens])
    return Encoded(torch.arange(len(tokens)), torch.ones(len(tokens), dtype=torch.bool), ends, spans=places)


def groups(text, student, teacher):
    """Groups of one answer as numbers of tokens, from the tokens' (begin, end) and with an end token on each side."""
    sides = [
        encoded(*[(1, *token) for token in tokens], (1, tokens[-1][1], tokens[-1][1] + 4, "end"))
        for tokens in (student, teacher)
    ]
    return [
        (range(*a), range(*b)) for a, b in zip(*(g.tolist() for g in group_tokens(*sides, ["", text])), strict=True)
    ]


def sizes(*arguments):
    return [(len(a), len(b)) for a, b in groups(*arguments)]


@pytest.mark.parametrize(
    ("text", "student", "teacher", "expected"),
    [
        ("abcd", [(0, 2), (2, 4)], [(0, 2), (2, 4)], [(1, 1), (1, 1), (1, 1)]),
        ("abcd", [(0, 1), (1, 4)], [(0, 3), (3, 4)], [(2, 2), (1, 1)]),
        ("abcd", [(0, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)], [(1, 4), (1, 1)]),
        # The space belongs to the next word, to the previous one, is a token, or is trimmed.
        ("ab cd", [(0, 2), (2, 5)], [(0, 3), (3, 5)], [(1, 1), (1, 1), (1, 1)]),
        ("ab cd", [(0, 2), (2, 5)], [(0, 2), (2, 3), (3, 5)], [(1, 1), (1, 2), (1, 1)]),
        ("ab cd", [(0, 3), (3, 5)], [(0, 2), (2, 3), (3, 5)], [(1, 2), (1, 1), (1, 1)]),
        ("ab cd", [(0, 2), (3, 5)], [(0, 2), (2, 5)], [(1, 1), (1, 1), (1, 1)]),
        ("ab cd", [(0, 2), (3, 5)], [(0, 3), (3, 5)], [(1, 1), (1, 1), (1, 1)]),
        # Boundaries inside white space that only one side has.
        ("a   b", [(0, 1), (1, 2), (2, 4), (4, 5)], [(0, 1), (1, 4), (4, 5)], [(1, 1), (2, 1), (1, 1), (1, 1)]),
        ("a   b", [(0, 2), (2, 5)], [(0, 1), (1, 3), (3, 5)], [(1, 1), (1, 2), (1, 1)]),
        # Three tokens of one character.
        ("a☃b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)], [(1, 1), (3, 1), (1, 1), (1, 1)]),
        ("a☃b", [(0, 1), (1, 2), (1, 3)], [(0, 2), (1, 2), (2, 3)], [(3, 3), (1, 1)]),
        # White space that the template adds before and after.
        ("ab", [(-1, 0), (0, 2)], [(0, 2)], [(2, 1), (1, 1)]),
        ("ab", [(-1, 2)], [(0, 2)], [(1, 1), (1, 1)]),
        ("ab", [(-1, 0), (0, 2)], [(-1, 0), (0, 2)], [(1, 1), (1, 1), (1, 1)]),
        ("ab", [(0, 2), (2, 3)], [(0, 2)], [(1, 1), (2, 1)]),
        ("ab", [(0, 3)], [(0, 2)], [(1, 1), (1, 1)]),
    ],
)
def test_sizes_of_groups(text, student, teacher, expected):
    assert sizes(text, student, teacher) == expected
    assert sizes(text, teacher, student) == [(b, a) for a, b in expected]


def test_every_token_is_in_one_group_in_order():
    generator = torch.Generator().manual_seed(0)
    text = "some words, and  more\n\nof them "
    for _ in range(200):
        sides = []
        for _ in range(2):
            cuts = [0, *(torch.rand(len(text) - 1, generator=generator) < 0.3).nonzero().flatten().add(1).tolist()]
            sides.append(list(zip(cuts, [*cuts[1:], len(text)], strict=True)))
        found = groups(text, *sides)
        for side, tokens in enumerate(sides):
            assert [i for group in found for i in group[side]] == list(range(len(tokens) + 1))
        exact = {b for _, b in sides[0]} & {b for _, b in sides[1]}
        assert len(found) >= len(exact) + 1
        assert sizes(text, sides[0], sides[0]) == [(1, 1)] * (len(sides[0]) + 1)


def test_a_beginning_that_only_one_model_supervises_is_left_out():
    # The teacher's prompt ends in a token that holds the answer's first letter.
    assert groups("abcd", [(0, 2), (2, 4)], [(1, 2), (2, 4)]) == [(range(1, 2), range(1, 2)), (range(2, 3),) * 2]


def test_further_end_tokens_are_in_no_group():
    student = encoded((1, 0, 1), (1, 1, 2, "end"), (1, 2, 3, "end"), (3, 0, 1), (3, 1, 2, "end"))
    teacher = encoded((1, 0, 1), (1, 1, 2, "end"), (3, 0, 1))
    ours, theirs = group_tokens(student, teacher, ["", "a", "", "b"])
    assert ours.tolist() == [[0, 1], [1, 2], [3, 4]]
    assert theirs.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_an_answer_without_a_token_is_refused():
    both, one = encoded((1, 0, 1), (3, 0, 1)), encoded((1, 0, 1), (3, 1, 2, "end"))
    with pytest.raises(BadSample, match="misaligned: answer 2: no token for the teacher"):
        group_tokens(both, one, ["", "a", "", "b"])
    with pytest.raises(BadSample, match="misaligned: answer 2: no token for the student"):
        group_tokens(one, both, ["", "a", "", "b"])
