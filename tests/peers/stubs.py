"""Replace packages that another harness imports but its scorers do not use, so that they need not be installed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

HARNESSES = ("vlmeval", "lmms_eval")


class _Kind(type):
    """Metaclass of classes that can be called, inherited from, subscripted and asked for any attribute."""

    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)

    def __getitem__(cls, key: Any) -> Any:
        return cls


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(self: Any, *given: Any, **options: Any) -> Any:
        decorated = len(given) == 1 and callable(given[0]) and not options
        return given[0] if decorated else self

    # An empty text, because some modules put these values into patterns on import.
    new = {"__new__": lambda cls, *given, **options: str.__new__(cls, ""), "__init__": lambda *given, **options: None}
    return _Kind(name, (str,), {**new, "__call__": call})


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _stand_in(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that no other finder knows, for a harness only: other packages probe imports too."""

    def __init__(self) -> None:
        self.made: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        package = name.partition(".")[0]
        if package in HARNESSES or not (package in self.made or _importer() in HARNESSES):
            return None
        self.made.add(package)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _importer() -> str:
    """Return the package of the module that is importing."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def install() -> set[str]:
    """Start replacing packages; their names are added to the set."""
    finder = _Finder()
    sys.meta_path.append(finder)
    return finder.made


def bare_package(name: str) -> None:
    """Enter a package whose ``__init__`` imports everything in it, so that its modules can be imported one by one."""
    parent, _, last = name.rpartition(".")
    module = ModuleType(name)
    module.__path__ = [f"{next(iter(sys.modules[parent].__path__))}/{last}"]
    sys.modules[name] = module
