"""Losses for distilling classifiers: those on logits from vlm_distill, losses of a batch, and losses on features.

To add one: write its class in a file of its own, and list it in ``catalogue.py``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .catalogue import REGISTRY, available, build

if TYPE_CHECKING:
    from .dist import DIST
    from .hard_labels import HardLabels
    from .label_cross_entropy import CrossEntropy
    from .mlkd import MLKD
    from .stage_features import AttentionTransfer, FitNet, RelationalKD, SimilarityPreserving

__all__ = [
    "DIST",
    "MLKD",
    "REGISTRY",
    "AttentionTransfer",
    "CrossEntropy",
    "FitNet",
    "HardLabels",
    "RelationalKD",
    "SimilarityPreserving",
    "available",
    "build",
]


def __getattr__(name: str) -> Any:
    for entry in REGISTRY.entries.values():
        module, _, kind = entry.home.partition(":")
        if kind == name and module.startswith(__name__):
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
