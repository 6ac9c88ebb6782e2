"""Work on several samples at once: a bad one becomes a result, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from .errors import BadSample

T = TypeVar("T")
U = TypeVar("U")


def attempt(function: Callable[..., T], *args: object) -> T | BadSample:
    """Return what a function returns, or the ``BadSample`` that it raises."""
    try:
        return function(*args)
    except BadSample as bad:
        return bad


def checked(result: T | BadSample) -> T:
    """Return a result, or raise the ``BadSample`` that it is."""
    if isinstance(result, BadSample):
        raise result
    return result


def with_good(
    function: Callable[[list[T]], Sequence[U | BadSample]], items: Sequence[T | BadSample]
) -> list[U | BadSample]:
    """Call a function once with all good items. Return its results in the items' places, beside the bad samples."""
    results = iter(function([item for item in items if not isinstance(item, BadSample)]))
    return [item if isinstance(item, BadSample) else next(results) for item in items]
