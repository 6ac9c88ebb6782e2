"""Errors of input: `UserError`, a mistake that ends a command, and `BadSample`, which may be skipped.

Any error's message can be had as one line.
"""

import re

_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
# Unprintable characters, and marks that change the direction of the text that follows in a terminal.
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_DETAIL = 300


def one_line(text: str) -> str:
    """Return a text as one line that any terminal and encoding can show; unprintable characters are escaped."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), _BREAKS.sub(" ", text))


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class BadSample(Exception):
    """A sample that cannot be used. The message is the reason; the caller knows which sample it is.

    Args:
        reason: a short category that many samples can share, to be counted ("image not found").
        detail: the specifics of this one (a path, a length); shortened and made a single line.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = one_line(detail[: 2 * _DETAIL])
        detail = detail if len(detail) <= _DETAIL else f"{detail[:_DETAIL]}…"
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


def first_line(error: BaseException) -> str:
    """Return an error's message as one line: its first, and the next if the first only announces the cause (``…:``)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    told = lines[0]
    for line in lines[1:]:
        if not told.endswith(":"):
            break
        told = f"{told} {line}"
    # A message that is only a key ("'model_type'") says nothing without the kind of error.
    if isinstance(error, KeyError):
        told = f"KeyError: {told}"
    return told[:_DETAIL]
