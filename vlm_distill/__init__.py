"""vlm-distill: distil a large vision-language model into a small one.

The public API: :func:`distill`, :func:`evaluate`, :func:`load_vlm`, :mod:`losses`, and the error :class:`UserError`
(docs/python.md). Each is imported when it is first used, so that ``import vlm_distill`` costs nothing and works in a
project with a package ``data`` of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from data.errors import UserError

    from . import losses
    from .api import DistilledRun, distill, evaluate
    from .models import load_vlm

__all__ = ["DistilledRun", "UserError", "__version__", "distill", "evaluate", "load_vlm", "losses"]

#: The package that each name is imported from.
_HOMES = dict.fromkeys(("DistilledRun", "UserError", "distill", "evaluate"), "api") | {"load_vlm": "models"}


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module(".losses", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
