"""``Registry``: losses by the names that configurations use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

from .base import DistillationLoss, Loss
from .errors import LossError
from .parameters import check_flag, nearest
from .standardise import Standardised

L = TypeVar("L", bound=Loss)


class Registry(Generic[L]):
    """Classes of losses by name.

    Args:
        kinds: the classes; a name occurs once.
    """

    def __init__(self, kinds: Mapping[str, type[L]]) -> None:
        self.kinds = dict(kinds)

    def available(self, kind: type[Loss] = Loss) -> dict[str, str]:
        """Return the names that ``build`` knows, each with one line about the loss; optionally of one kind only."""
        known = {name: loss for name, loss in self.kinds.items() if issubclass(loss, kind)}
        return {name: (inspect.getdoc(loss) or "").splitlines()[0] for name, loss in known.items()}

    def build(self, name: str, params: Mapping[str, Any]) -> L:
        """Build a loss from its name and its constructor's parameters; losses on logits also take ``standardise``.

        Raises:
            LossError: there is no such loss or parameter, or a value is out of range.
        """
        if name not in self.kinds:
            raise LossError(f"no loss is called {name!r}{nearest(name, self.kinds)}; there are {', '.join(self.kinds)}")
        kind, params = self.kinds[name], dict(params)
        known = list(inspect.signature(kind).parameters)
        standardise = False
        if "standardise" in params and "standardise" not in known:
            standardise = _wants_standardised(name, kind, params.pop("standardise"))
        loss = make(kind, f"loss {name}", params)
        return cast(L, Standardised(loss)) if standardise and isinstance(loss, DistillationLoss) else loss


def make(kind: type[L], where: str, params: Mapping[str, Any]) -> L:
    """Return a loss of a class, made with its constructor's parameters.

    Args:
        kind: the class.
        where: the loss, for messages.
        params: parameters of its constructor.

    Raises:
        LossError: there is no such parameter, or a value has the wrong type or is out of range.
    """
    known = list(inspect.signature(kind).parameters)
    for param in params:
        if param not in known:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise LossError(f"{where} has no parameter {param!r}{nearest(param, known)}; {listed}")
    try:
        return kind(**params)
    except LossError:
        raise
    except (TypeError, ValueError) as error:  # a value that the loss does not check for
        given = ", ".join(f"{param}: {value!r}"[:100] for param, value in params.items())
        raise LossError(f"{where}: cannot be made with {given}: {error}") from None


def _wants_standardised(name: str, kind: type[Loss], given: Any) -> bool:
    """Return whether to standardise; raise ``LossError`` for a loss that does not compare logits class by class."""
    wanted = check_flag(f"loss {name}: standardise", given)
    compares = issubclass(kind, DistillationLoss) and "teacher" in kind.needs and not kind.takes_groups
    if wanted and not compares:
        raise LossError(
            f"loss {name}: standardise is for losses that compare the student's logits with the teacher's, class by "
            "class; leave it out"
        )
    return wanted
