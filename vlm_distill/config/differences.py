"""Compare configurations, also those of earlier versions, by dotted key; and what runs of several seeds share."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

#: Keys of where a run is, and of how it was placed on the machine.
PLACES = ("output", "training.device", "training.resume", "data.workers", "data.prefetch")
SEED = "training.seed"


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a configuration by dotted key; entries of lists by their number."""
    if not isinstance(tree, Mapping | list | tuple) or not tree:
        return {prefix: tree}
    found: dict[str, Any] = {}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in items:
        found |= flattened(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def without_seed(settings: Mapping[str, Any]) -> str:
    """Return a text that runs of one training have in common, whatever their seed and place."""
    flat = flattened(settings)
    kept = {key: value for key, value in flat.items() if key != SEED and key not in PLACES}
    return json.dumps(kept, sort_keys=True, default=str)


def completed(plain: Any, kind: type[BaseModel]) -> Any:
    """Return a configuration that an earlier version wrote, as this version would write it.

    Keys added since get their defaults, which is how they were before; keys removed since are dropped if they were off:
    false, null or empty.

    Args:
        plain: a resolved configuration, as plain values. It is not changed.
        kind: the model that it is of.

    Returns:
        The plain values without null ones; ``plain`` itself if this version does not know what it says.
    """
    try:
        return kind.model_validate(plain).model_dump(mode="json", exclude_none=True)
    except ValidationError as error:
        unknown = [mistake["loc"] for mistake in error.errors() if mistake["type"] == "extra_forbidden"]
    known = copy.deepcopy(plain)
    dropped = [_drop_off(known, path) for path in unknown]
    return completed(known, kind) if any(dropped) else plain


def _drop_off(tree: Any, path: Sequence[int | str]) -> bool:
    """Remove the key at a path if it is off, and return whether it was."""
    for step in path[:-1]:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):  # the name of a union's member, which is in no file
            return False
    if tree.get(path[-1], True):
        return False
    del tree[path[-1]]
    return True
