"""``Registry``: losses by the names that configurations use. Torch is imported once a loss is built."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .errors import LossError
from .parameters import check_choice, check_flag, nearest

if TYPE_CHECKING:
    from .base import Loss

L = TypeVar("L", bound="Loss")

TEACHER, TARGETS = frozenset({"teacher"}), frozenset({"targets"})


@dataclass(frozen=True)
class Entry:
    """What is known of a loss before torch is imported; a test holds it to the class.

    Attributes:
        home: its class, as ``package.module:Class``.
        parameters: names of the constructor's parameters.
        needs: as in :class:`~.base.Loss`.
        compares: whether it can be TAID's divergence.
        classes: whether it also compares class logits, so that classifiers learn from it too.
        matches: whether it compares image tokens or features of images, which a term may match.
    """

    home: str
    parameters: tuple[str, ...] = ()
    needs: frozenset[str] = TEACHER
    compares: bool = False
    classes: bool = True
    matches: bool = False

    def summary(self) -> str:
        """Return the first line of the class's docstring, from its source: importing it would import torch."""
        return _first_line(self.home)

    def load(self) -> type[Any]:
        """Import the class and return it."""
        module, _, name = self.home.partition(":")
        return cast(type[Any], getattr(import_module(module), name))


@cache
def _first_line(home: str) -> str:
    """Return the first line of the docstring of a class, given as ``package.module:Class``."""
    module, _, name = home.partition(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == name)
    return (ast.get_docstring(found) or "").partition("\n")[0]


class Registry(Generic[L]):
    """Losses by name.

    Args:
        entries: of the losses, by name.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    @property
    def kinds(self) -> dict[str, type[L]]:
        """The classes by name."""
        return {name: entry.load() for name, entry in self.entries.items()}

    def available(self, kind: type[Loss] | None = None) -> dict[str, str]:
        """Return the names that ``build`` knows, each with one line about the loss; optionally of one kind only."""
        chosen = self.entries
        if kind is not None:
            chosen = {name: entry for name, entry in chosen.items() if issubclass(entry.load(), kind)}
        return {name: entry.summary() for name, entry in chosen.items()}

    def check(self, name: str, params: Mapping[str, Any]) -> Entry:
        """Return the loss's entry. Values of parameters are checked when the loss is built.

        Raises:
            LossError: there is no such loss, or it has no such parameter.
        """
        if name not in self.entries:
            raise LossError(
                f"no loss is called {name!r}{nearest(name, self.entries)}; there are {', '.join(self.entries)}"
            )
        entry = self.entries[name]
        check_parameters(f"loss {name}", entry.parameters, [param for param in params if param != "standardise"])
        if "divergence" in entry.parameters and "divergence" in params:
            self.divergence(f"loss {name}: divergence", params["divergence"])
        return entry

    def divergence(self, where: str, given: Any) -> tuple[str, dict[str, Any]]:
        """Return name and parameters of a divergence, given as a name or as a mapping with its name and parameters.

        Args:
            where: the loss and the parameter, for messages.
            given: as in the configuration.

        Raises:
            LossError: it is neither, or there is no such divergence or parameter.
        """
        if not isinstance(given, str | Mapping):
            raise LossError(
                f"{where} is {given!r}; give a name, or a mapping with a name as in {{name: jsd, beta: 0.1}}"
            )
        params = {"name": given} if isinstance(given, str) else dict(given)
        if "name" not in params:
            raise LossError(f"{where} has no name; give it as in {{name: jsd, beta: 0.1}}")
        known = [name for name, entry in self.entries.items() if entry.compares]
        name = check_choice(where, params.pop("name"), known)
        if "temperature" in params:
            raise LossError(f"{where} {name} takes no temperature of its own; leave temperature out")
        check_parameters(f"{where} {name}", self.entries[name].parameters, params)
        return name, params

    def build(self, name: str, params: Mapping[str, Any]) -> L:
        """Build a loss from its name and its constructor's parameters; losses on logits also take ``standardise``.

        Raises:
            LossError: there is no such loss or parameter, or a value is out of range.
        """
        entry, params = self.check(name, params), dict(params)
        kind = entry.load()
        if "standardise" in entry.parameters or "standardise" not in params:
            return make(kind, f"loss {name}", params)
        wanted = _wants_standardised(name, kind, params.pop("standardise"))
        loss = make(kind, f"loss {name}", params)
        if not wanted:
            return cast(L, loss)
        from .standardise import Standardised

        return cast(L, Standardised(loss))


def make(kind: type[L], where: str, params: Mapping[str, Any]) -> L:
    """Return a loss of a class, made with its constructor's parameters.

    Args:
        kind: the class.
        where: the loss, for messages.
        params: parameters of its constructor.

    Raises:
        LossError: there is no such parameter, or a value has the wrong type or is out of range.
    """
    check_parameters(where, list(inspect.signature(kind).parameters), params)
    try:
        return kind(**params)
    except LossError:
        raise
    except (TypeError, ValueError) as error:  # a value that the loss does not check for
        given = ", ".join(f"{param}: {value!r}"[:100] for param, value in params.items())
        raise LossError(f"{where}: cannot be made with {given}: {error}") from None


def check_parameters(where: str, known: Sequence[str], params: Iterable[str]) -> None:
    """Raise ``LossError`` for the first of the parameters that is not among the known ones."""
    for param in params:
        if param not in known:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise LossError(f"{where} has no parameter {param!r}{nearest(param, known)}; {listed}")


def _wants_standardised(name: str, kind: type[Any], given: Any) -> bool:
    """Return whether to standardise; raise ``LossError`` for a loss that does not compare logits class by class."""
    from .base import DistillationLoss

    wanted = check_flag(f"loss {name}: standardise", given)
    compares = issubclass(kind, DistillationLoss) and "teacher" in kind.needs and not kind.takes_groups
    if wanted and not compares:
        raise LossError(
            f"loss {name}: standardise is for losses that compare the student's logits with the teacher's, class by "
            "class; leave it out"
        )
    return wanted
