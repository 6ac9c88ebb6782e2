"""Report what a loss refuses like every other mistake in a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import UserError
from vlm_distill.losses import LossError


@contextmanager
def loss_mistakes() -> Iterator[None]:
    """Context manager and decorator: raise a ``LossError`` as a ``UserError``.

    The losses stand alone and know no exception of this project but their own.
    """
    try:
        yield
    except LossError as error:
        raise UserError(str(error)) from None
