"""The console that everything is printed on: it takes square brackets in people's names as what they are."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is: rich's markup would fail on a name such as ``run[/1]``."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
