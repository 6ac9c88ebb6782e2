"""Compare configurations: their values by dotted key, and what identifies a training whatever its seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

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
