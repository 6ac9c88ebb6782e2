"""Two ways in which input can be wrong: a person's mistake ends a command, a bad sample need not."""

import re

_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
# Beside what is not printable, marks that turn the direction of what a terminal shows after them.
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_DETAIL = 300


def one_line(text: str) -> str:
    """A text as one line that any terminal and any encoding can show: what is unprintable is escaped."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), _BREAKS.sub(" ", text))


class UserError(Exception):
    """A mistake a person can mend. The message is one line: what, where and what to do.

    Commands print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class BadSample(Exception):
    """One sample cannot be used. The message is the reason, without the sample's place: the reader's caller knows it.

    Args:
        reason: a short class of faults that many samples share, so that they can be counted ("image not found").
        detail: what is special about this one (a path, a length); what it takes from the data is made one short line.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = one_line(detail[: 2 * _DETAIL])
        detail = detail if len(detail) <= _DETAIL else f"{detail[:_DETAIL]}…"
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)
