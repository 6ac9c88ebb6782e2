"""From answers in characters to supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from torch import Tensor

from .answer_spans import Span
from .common import integers


def mark_tokens(
    text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int], spans: Sequence[Span], special: set[int]
) -> tuple[list[bool], list[bool]]:
    """Return which tokens are supervised, and which of those are end tokens.

    A token is supervised if it lies in an answer, or between an answer's text and its end token. The end token is the
    first token after the text, blanks aside, if it is special and the template ends turns with a special token. A token
    that reaches from the prompt into the answer counts as the answer's only if its part of the prompt is blank.

    Args:
        text: the rendered conversation.
        offsets: start and stop of each token in ``text``.
        ids: token ids.
        spans: from :func:`find_answers`.
        special: ids of special tokens.
    """
    supervised = [False] * len(ids)
    ends = [False] * len(ids)
    token = 0
    for span in spans:
        while token < len(ids) and offsets[token][1] <= span.start:
            token += 1
        trailing: list[int] = []
        while token < len(ids):
            a, b = offsets[token]
            if a < span.start and text[a : span.start].strip():
                token += 1
                continue
            if a < span.stop:
                supervised[token] = True
            elif ids[token] in special and span.closed:
                ends[token] = True
                for i in [*trailing, token]:
                    supervised[i] = True
                token += 1
                break
            elif ids[token] in special or text[a:b].strip():
                break
            else:
                trailing.append(token)
            token += 1
    return supervised, ends


def token_spans(
    text: str,
    offsets: Sequence[tuple[int, int]],
    supervised: Sequence[bool],
    ends: Sequence[bool],
    spans: Sequence[Span],
) -> Tensor:
    """Return where the supervised tokens lie in the answers' own texts.

    Args:
        text: the rendered conversation.
        offsets: start and stop of each token in ``text``.
        supervised, ends: from :func:`mark_tokens`.
        spans: from :func:`find_answers`.

    Returns:
        ``Encoded.spans``, int64 ``[n, 3]``.
    """
    found: list[int] = []
    answer = 0
    for token in compress(range(len(offsets)), supervised):
        a, b = offsets[token]
        while answer + 1 < len(spans) and spans[answer + 1].start < b:
            answer += 1
        number, start, own = _piece_of(text, a, b, spans[answer].pieces)
        # An end token belongs to the text that it ends, whatever the template writes between the two.
        if ends[token]:
            number = spans[answer].pieces[-1][0]
        elif not own:
            number = -1 - number
        found += (number, a - start, b - start)
    return integers(found).reshape(-1, 3)


def _piece_of(text: str, a: int, b: int, pieces: Sequence[tuple[int, int, int]]) -> tuple[int, int, bool]:
    """Return the piece that a token belongs to or is next to: number, start, and whether the token belongs to it."""
    for number, start, stop in pieces:
        overlaps = a < stop and b > start
        blank_before = b <= start and not text[a:start].strip()
        blank_after = a >= stop and not text[stop:b].strip()
        if overlaps or blank_before or blank_after:
            return number, start, True
    number, start, _ = next((piece for piece in pieces if b <= piece[1]), pieces[-1])
    return number, start, False
