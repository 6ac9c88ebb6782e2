"""The exception that the losses raise for what a person asked of them."""

from __future__ import annotations


class LossError(ValueError):
    """A loss was given a name, a parameter or features that it cannot work with.

    The message is one line that says what is wrong and what to give instead. Commands report it like every other
    mistake in a configuration: without a traceback, with exit code 2.
    """
