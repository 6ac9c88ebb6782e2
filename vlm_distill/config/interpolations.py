"""Limits for OmegaConf's interpolations (``${section.key}``, ``${oc.env:NAME}``), and escaping of plain text."""

from __future__ import annotations

import os
import re
from typing import Any

from data.errors import UserError

#: In a configuration with its interpolations resolved.
_MOST_CHARACTERS = 1_000_000
#: What an interpolation counts in addition to its value: resolving one takes about a millisecond.
_EACH = 100
_DEEPEST = 50
_INNERMOST = re.compile(r"\$\{([^{}]*)\}")
_NESTED = "\0"


def escaped(tree: Any) -> Any:
    """Escape ``${`` in all values, which OmegaConf would read as an interpolation."""
    if isinstance(tree, dict):
        return {key: escaped(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [escaped(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", tree)
    return tree


def check_expansion(tree: Any, where: str) -> None:
    """Check, before any interpolation is resolved, that they do not multiply without bounds.

    Raises:
        UserError: the resolved configuration would be too large, or interpolations are nested too deeply.
    """
    try:
        fits = _Expansion(tree).size((), ()) <= _MOST_CHARACTERS
    except (_TooLarge, RecursionError):
        fits = False
    if not fits:
        raise UserError(f"{where}: values that refer to values (${{…}}) make too large a configuration; write them out")


class _TooLarge(Exception):
    pass


class _Expansion:
    """Sizes of a configuration's values in characters, with interpolations resolved."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.known: dict[tuple[Any, ...], int] = {}

    def size(self, way: tuple[Any, ...], above: tuple[tuple[Any, ...], ...]) -> int:
        """Return the size of the value at a path of keys; ``above`` holds the paths whose interpolations led here."""
        if way in above:
            return 0  # a circle, which OmegaConf reports
        if way not in self.known:
            if len(above) > _DEEPEST:
                raise _TooLarge
            self.known[way] = self._size(self._at(way), way, above)
            if self.known[way] > _MOST_CHARACTERS:
                raise _TooLarge
        return self.known[way]

    def _size(self, value: Any, way: tuple[Any, ...], above: tuple[tuple[Any, ...], ...]) -> int:
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            return 1 + sum(self.size((*way, key), above) for key in keys)
        if not isinstance(value, str) or "${" not in value:
            return len(value) if isinstance(value, str) else 1
        return len(value) + sum(_EACH + self._target(inner, way, above) for inner in _innermost_first(value))

    def _target(self, inner: str, way: tuple[Any, ...], above: tuple[tuple[Any, ...], ...]) -> int:
        """Return the size of the value that ``${inner}`` resolves to."""
        function, colon, arguments = inner.partition(":")
        if not colon:
            name = inner
        elif function.strip().startswith(("oc.select", "oc.dict")):
            name = arguments.partition(",")[0]
        elif function.strip() == "oc.env":
            return len(os.environ.get(arguments.partition(",")[0].strip(), ""))
        else:
            return 0  # interpolations nested in it have been counted
        if _NESTED in name:
            # It is not known yet which value is meant: at most, all of them.
            return self.size((), (*above, way))
        return self.size(self._path(name.strip(), way), (*above, way))

    def _path(self, name: str, way: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the path that a reference at ``way`` names; leading dots are relative to its section."""
        rest = name.lstrip(".")
        dots = len(name) - len(rest)
        start = way[: max(len(way) - dots, 0)] if dots else ()
        return (*start, *(key for key in re.split(r"[.\[\]]+", rest) if key))

    def _at(self, way: tuple[Any, ...]) -> Any:
        value = self.tree
        for key in way:
            if isinstance(value, list) and str(key).isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict):
                value = value.get(key, next((v for k, v in value.items() if str(k) == str(key)), None))
            else:
                return None
        return value


def _innermost_first(text: str) -> list[str]:
    """Return the insides of all interpolations in a text, innermost first; nested ones are replaced by a mark."""
    found: list[str] = []
    while inner := _INNERMOST.findall(text):
        found += inner
        text = _INNERMOST.sub(_NESTED, text)
        if len(found) > _MOST_CHARACTERS // _EACH:
            raise _TooLarge
    return found
