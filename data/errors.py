"""Two ways in which input can be wrong: a person's mistake ends a command, a bad sample need not."""


class UserError(Exception):
    """A mistake a person can mend. The message is one line: what, where and what to do.

    Commands print it without a traceback and exit with code 2.
    """


class BadSample(Exception):
    """One sample cannot be used. The message is the reason, without the sample's place: the reader's caller knows it.

    Args:
        reason: a short class of faults that many samples share, so that they can be counted ("image not found").
        detail: what is special about this one (a path, a length).
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
