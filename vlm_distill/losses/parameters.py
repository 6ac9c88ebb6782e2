"""Checks of the losses' parameters, with one-line messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import LossError

#: The largest parameter: its square still fits float32.
LARGEST = 1e18


def check_number(where: str, value: Any, low: float, high: float = LARGEST, *, above: bool = False) -> float:
    """Return a parameter as a float.

    Args:
        where: the loss and the parameter, for the message.
        value: the given value.
        low: the smallest value allowed, or with ``above`` the value that it must exceed.
        high: the largest value allowed.
        above: whether ``low`` itself is refused.

    Raises:
        LossError: ``value`` is not a number in this range, or is larger than :data:`LARGEST`.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) > LARGEST:
        raise LossError(f"{where} is {value!r}; give a number of at most {LARGEST:g}")
    if number and (low < value if above else low <= value) and value <= high:
        return float(value)
    if above:
        span = f"above {low:g}"
    elif high == LARGEST:
        span = f"of {low:g} or more"
    else:
        span = f"from {low:g} to {high:g}"
    raise LossError(f"{where} is {value!r}; give a number {span}")


def check_choice(where: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else raise ``LossError``."""
    if value not in choices:
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise LossError(f"{where} is {value!r}{near}; it must be one of {', '.join(choices)}")
    return str(value)


def check_flag(where: str, value: Any) -> bool:
    """Return ``value`` if it is true or false, else raise ``LossError``."""
    if not isinstance(value, bool):
        raise LossError(f"{where} is {value!r}; give true or false")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a message: the known name nearest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
