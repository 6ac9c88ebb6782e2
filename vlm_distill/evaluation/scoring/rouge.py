"""ROUGE-L: how much of an answer occurs in the reference in the same order."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of words, 0…1, for the best reference (Lin, ROUGE, 2004).

    Words are lower-cased runs of letters and digits, without stemming. On ASCII text the values equal those of
    Google's ``rouge-score``.
    """
    ours = _words(answer)
    return max((_f1(ours, _words(reference)) for reference in references), default=0.0)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _f1(ours: list[str], theirs: list[str]) -> float:
    common = longest_common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Bit-parallel: an integer's bits hold a row of the usual table, 0 where the length grows (Hyyrö, 2004).
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & every
    return len(a) - row.bit_count()
