"""The console that everything is printed on; square brackets in names are not markup."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text unchanged; rich's markup would fail on a name such as ``run[/1]``."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
