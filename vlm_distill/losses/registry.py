"""``Registry``: losses by the names that configurations use. Torch is imported once a loss is built."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .errors import LossError
from .parameters import check_choice, check_flag, nearest
from .plugins import Plugins, load

if TYPE_CHECKING:
    from .base import Loss

L = TypeVar("L", bound="Loss")

#: Losses from outside, by name.
PLUGINS = Plugins("loss", "vlm_distill.losses", LossError)

TEACHER, TARGETS = frozenset({"teacher"}), frozenset({"targets"})


@dataclass(frozen=True)
class Entry:
    """What is known of a loss: of ours before torch is imported (a test holds it to the class), of a plug-in after.

    Attributes:
        home: its class, as ``package.module:Class``.
        parameters: names of the constructor's parameters.
        needs: as in :class:`~.base.Loss`.
        compares: whether it can be TAID's divergence.
        classes: whether it also compares class logits, so that classifiers learn from it too.
        matches: as in :class:`~.feature_loss.FeatureLoss`.
        imported: false for a plug-in that is yet to be imported: nothing is known of it.
    """

    home: str
    parameters: tuple[str, ...] = ()
    needs: frozenset[str] = TEACHER
    compares: bool = False
    classes: bool = True
    matches: bool = False
    imported: bool = True

    @classmethod
    def of(cls, kind: type[Any]) -> Entry:
        """Return what a plug-in's class says of the loss."""
        from .divergence import Divergence

        home = f"{kind.__module__}:{kind.__qualname__}"
        matches = getattr(kind, "matches", False)
        return cls(home, parameters_of(kind), kind.needs, compares=issubclass(kind, Divergence), matches=matches)

    def summary(self) -> str:
        """Return the first line of the class's docstring, from its source: importing it would import torch."""
        return _first_line(self.home)

    def load(self) -> type[Any]:
        """Import the class and return it."""
        return cast(type[Any], load(self.home))


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
    """Losses by name: ours, and :data:`PLUGINS`.

    Args:
        entries: of our losses, by name.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)
        PLUGINS.reserve({name: entry.home for name, entry in entries.items()})

    def available(self, kind: type[Loss] | None = None) -> dict[str, str]:
        """Return the names that ``build`` knows, each with one line about the loss; optionally of one kind only.

        Of plug-ins, the line says where they are from; those that cannot be imported are of no kind.
        """
        chosen = self.entries
        if kind is not None:
            chosen = {name: entry for name, entry in chosen.items() if issubclass(entry.load(), kind)}
        found = {name: entry.summary() for name, entry in chosen.items()}
        for name, origin in PLUGINS.names().items():
            if kind is None or self._is_a(name, kind):
                found[name] = f"plug-in: {origin}"
        return found

    def _is_a(self, name: str, kind: type[Loss]) -> bool:
        """Return whether a plug-in is a loss of some kind."""
        try:
            return issubclass(self.load(name), kind)
        except LossError:
            return False

    def entry(self, name: str) -> Entry:
        """Return what is known of a loss. Of a plug-in that is yet to be imported, this is nothing to refuse it for.

        Raises:
            LossError: there is no such loss.
        """
        if name in self.entries:
            return self.entries[name]
        if name not in PLUGINS:
            known = [*self.entries, *PLUGINS.names()]
            raise LossError(
                f"no loss is called {name!r}{nearest(name, known)}; there are {', '.join(known)}, and your own as "
                "package.module:Class"
            )
        found = PLUGINS.imported(name)
        if found is None:
            return Entry(name, needs=frozenset(), compares=True, matches=True, imported=False)
        return Entry.of(check_class(name, found))

    def load(self, name: str) -> type[L]:
        """Import a loss's class, and return it. Of a plug-in, :meth:`entry` knows everything from then on.

        Raises:
            LossError: there is no such loss, or it cannot be imported.
        """
        entry = self.entry(name)
        if name in self.entries:
            return entry.load()
        return check_class(name, PLUGINS.find(name))

    def check(self, name: str, params: Mapping[str, Any]) -> Entry:
        """Return the loss's entry. Values of parameters are checked when the loss is built.

        Raises:
            LossError: there is no such loss, or it has no such parameter.
        """
        entry = self.entry(name)
        if not entry.imported:
            return entry
        check_parameters(f"loss {name}", entry.parameters, [param for param in params if param != "standardise"])
        if "divergence" in entry.parameters and "divergence" in params and name in self.entries:
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
        name = params.pop("name")
        plugin = isinstance(name, str) and name in PLUGINS
        if not plugin:
            check_choice(where, name, [ours for ours, entry in self.entries.items() if entry.compares])
        if "temperature" in params:
            raise LossError(f"{where} {name} takes no temperature of its own; leave temperature out")
        if not plugin:
            check_parameters(f"{where} {name}", self.entries[name].parameters, params)
        return name, params

    def build(self, name: str, params: Mapping[str, Any]) -> L:
        """Build a loss from its name and its constructor's parameters; losses on logits also take ``standardise``.

        Raises:
            LossError: there is no such loss or parameter, or a value is out of range.
        """
        kind: type[Any] = self.load(name)
        entry, params = self.check(name, params), dict(params)
        if "standardise" in entry.parameters or "standardise" not in params:
            return make(kind, f"loss {name}", params)
        wanted = _wants_standardised(name, kind, params.pop("standardise"))
        loss = make(kind, f"loss {name}", params)
        if not wanted:
            return cast(L, loss)
        from .standardise import Standardised

        return cast(L, Standardised(loss))


def check_class(name: str, found: Any) -> type[Any]:
    """Return a plug-in if it is a class of losses whose ``needs`` are known, else raise ``LossError``."""
    from .base import BatchLoss, DistillationLoss
    from .feature_loss import FeatureLoss

    if isinstance(found, type) and issubclass(found, BatchLoss | DistillationLoss | FeatureLoss):
        if not isinstance(found.needs, Set) or not found.needs <= TEACHER | TARGETS:
            raise LossError(
                f"loss {name}: needs is {found.needs!r}; make it a set of 'teacher', 'targets', both or none"
            )
        return found
    what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
    raise LossError(
        f"loss {name}: is {what}, not a loss; name a class derived from vlm_distill.losses.DistillationLoss, "
        "FeatureLoss or BatchLoss"
    )


def make(kind: type[L], where: str, params: Mapping[str, Any]) -> L:
    """Return a loss of a class, made with its constructor's parameters.

    Args:
        kind: the class.
        where: the loss, for messages.
        params: parameters of its constructor.

    Raises:
        LossError: there is no such parameter, or a value has the wrong type or is out of range.
    """
    check_parameters(where, parameters_of(kind), params)
    try:
        return kind(**params)
    except LossError:
        raise
    except (TypeError, ValueError) as error:  # a value that the loss does not check for
        given = ", ".join(f"{param}: {value!r}"[:100] for param, value in params.items()) or "no parameters"
        raise LossError(f"{where}: cannot be made with {given}: {error}") from None


def parameters_of(kind: type[Any]) -> tuple[str, ...]:
    """Return the names of a constructor's parameters; where it passes ``**others`` on, also those of its base."""
    found: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        given = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = [parameter.kind for parameter in given]
        named = [p.name for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found.update(dict.fromkeys(named))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return tuple(found)


def term_name(loss: str, taken: Collection[str]) -> str:
    """Return the name of a term: its loss's, a plug-in's without its module; numbered if it is taken."""
    name = re.sub(r"[^\w-]", "_", loss.rpartition(":")[2])
    return name if name not in taken else f"{name}_{len(taken) + 1}"


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
