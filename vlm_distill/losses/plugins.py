"""Plug-ins: parts from outside, named as ``module:attribute``, installed as entry points, or registered by a program.

Losses, benchmarks, data layouts and families of models are found by this one mechanism. It needs nothing but Python.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .parameters import nearest

_NAME = re.compile(r"[\w-]+")
# A file's name, such as my_losses.py:MyLoss, is no module's.
_PATH = re.compile(r"(?!.*\.py:)[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class Plugins:
    """The plug-ins of one kind.

    A plug-in is imported when it is used, never to look up its name: a broken one breaks no run that does without it,
    and reading a configuration runs no code.

    Args:
        kind: what one of them is, for messages: ``loss``.
        group: the group of entry points that name them: ``vlm_distill.losses``.
        error: raised for one that cannot be used, with one line: what is wrong, and what to do.
    """

    def __init__(self, kind: str, group: str, error: Callable[[str], Exception]) -> None:
        self.kind, self.group, self._error = kind, group, error
        self._own: dict[str, str] = {}
        self._registered: dict[str, Any] = {}

    def reserve(self, own: Mapping[str, str]) -> None:
        """Keep names for the suite itself.

        Args:
            own: where each of them is from, by name.

        Raises:
            error: a program has registered one of them.
        """
        for name in own:
            if name in self._registered:
                raise self._taken(name, _home(self._registered[name]), own[name])
        self._own.update(own)

    def register(self, name: str, part: Any) -> None:
        """Make a part known by a name, in this process.

        The same class or function may be registered again, as when a notebook's cell is run again.

        Raises:
            error: the name has other characters than letters, digits, ``_`` and ``-``, or is taken.
        """
        if not _NAME.fullmatch(name):
            raise self._error(f"{self.kind} {name!r}: a name has letters, digits, _ and - only; choose another")
        earlier = self._own.get(name)
        if earlier is None and name in self._installed():
            earlier = self.names()[name]
        if name in self._registered and _identity(self._registered[name]) != _identity(part):
            earlier = _home(self._registered[name])
        if earlier is not None:
            raise self._taken(name, _home(part), earlier)
        self._registered[name] = part

    def names(self) -> dict[str, str]:
        """Return where each plug-in with a name is from. Imports nothing."""
        found = {name: _home(part) for name, part in self._registered.items()}
        for name, points in self._installed().items():
            if name not in self._own:
                found.setdefault(name, " and ".join(map(_origin, points)))
        return found

    def clashes(self) -> list[str]:
        """Return a message for each installed plug-in that cannot be named, since its name is taken."""
        found = []
        for name, points in self._installed().items():
            if name in self._own:
                found += [str(self._taken(name, _origin(point), self._own[name])) for point in points]
            elif len(points) > 1:
                found.append(str(self._ambiguous(name)))
        return found

    def __contains__(self, name: str) -> bool:
        """Whether a name is a plug-in's, or says where to find one. Imports nothing."""
        return ":" in name or name in self._registered or (name not in self._own and name in self._installed())

    def find(self, name: str) -> Any:
        """Import a plug-in, and return it.

        Args:
            name: one of :meth:`names`, or ``module:attribute``.

        Raises:
            error: there is none, it cannot be imported, or two packages have one of this name.
        """
        return self._registered[name] if name in self._registered else self._load(name, self._path(name))

    def imported(self, name: str) -> Any | None:
        """Return a plug-in that was registered, or whose module was imported before; ``None`` for any other."""
        if name in self._registered:
            return self._registered[name]
        path = self._path(name)
        return self._load(name, path) if path.partition(":")[0] in sys.modules else None

    def _load(self, name: str, path: str) -> Any:
        try:
            return load(path)
        except LookupError as error:
            raise self._error(f"{self.kind} {name}: {error.args[0]}") from error.__cause__

    def _path(self, name: str) -> str:
        """Return the ``module:attribute`` of a plug-in that was not registered."""
        path = name
        if ":" not in name:
            points = self._installed().get(name, [])
            if not points:
                known = ", ".join(self.names()) or "none with a name"
                raise self._error(
                    f"no {self.kind} is called {name!r}; there are {known}; name yours as package.module:Name"
                )
            if len(points) > 1:
                raise self._ambiguous(name)
            path = points[0].value
        if not _PATH.fullmatch(path):
            raise self._error(f"{self.kind} {name}: {path!r} does not name a plug-in; write package.module:Name")
        return path

    def _installed(self) -> Mapping[str, list[EntryPoint]]:
        return _installed(self.group, tuple(sys.path))

    def _taken(self, name: str, new: str, earlier: str) -> Exception:
        return self._error(f"{self.kind} {name}: {new} cannot have this name, which {earlier} has; choose another")

    def _ambiguous(self, name: str) -> Exception:
        both = " and ".join(map(_origin, self._installed()[name]))
        return self._error(f"{self.kind} {name}: {both} have the same name; name one as module:attribute")


def load(path: str) -> Any:
    """Import what ``module:attribute`` names, and return it. The current directory is searched last.

    Raises:
        LookupError: there is no such module or attribute, or the module cannot be imported; says so in a sentence.
    """
    name, _, attribute = path.partition(":")
    module = _import(name)
    if not hasattr(module, attribute):
        where = getattr(module, "__file__", None) or "a folder without __init__.py"
        raise LookupError(f"{name} ({where}) has no {attribute}{nearest(attribute, vars(module))}; correct the name")
    return getattr(module, attribute)


def _import(name: str) -> ModuleType:
    """Import a module, from the current directory if it is not installed."""
    here, package = os.getcwd(), name.partition(".")[0]
    if package not in sys.modules:
        importlib.invalidate_caches()  # a program may have just written the file
        if find_spec(package) is None and here not in sys.path:
            # Last, so that nothing in it shadows an installed package. Commands and ranks start without it.
            sys.path.append(here)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise LookupError(
                f"there is no module {missing}; install its package, or start in the folder that holds it (this is "
                f"{here})"
            ) from None
        said = " ".join(str(error).split())[:200]
        raise LookupError(f"{name} cannot be imported: {type(error).__name__}: {said}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """Return the file and line that an import failed in."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    last = frames[-1]
    # A syntax error names its place itself; other errors may be raised before the module begins.
    if isinstance(error, SyntaxError) or last.filename in (__file__, importlib.__file__):
        return ""
    return f" ({last.filename}, line {last.lineno})"


@cache
def _installed(group: str, _: tuple[str, ...]) -> Mapping[str, list[EntryPoint]]:
    """Return a group's entry points by name, of the packages on a path; those of one name differ in their value."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, {})[point.value] = point
    return {name: list(points.values()) for name, points in found.items()}


def _origin(point: EntryPoint) -> str:
    package = "" if point.dist is None else f" of {point.dist.name} {point.dist.version}"
    return f"{point.value}{package}"


def _home(part: Any) -> str:
    """Return where a registered part is from."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"


def _identity(part: Any) -> Any:
    """Return what two definitions of one class or function have in common; of any other part, itself."""
    return _home(part) if hasattr(part, "__qualname__") else part
