"""Losses for distilling classifiers: those on logits from vlm_distill, losses of a batch, and losses on features."""

from __future__ import annotations

from typing import Any

from vlm_distill import losses
from vlm_distill.losses import BatchLoss, DistillationLoss, FeatureLoss, Loss, Registry

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

#: The losses that a classifier's configuration can name.
REGISTRY: Registry[DistillationLoss | BatchLoss | FeatureLoss] = Registry(
    {
        # Without the loss between tokenizers: classes are mapped before any loss.
        **{k: v for k, v in losses.REGISTRY.kinds.items() if issubclass(v, DistillationLoss) and not v.takes_groups},
        "cross_entropy": CrossEntropy,
        "hard_labels": HardLabels,
        "mlkd": MLKD,
        "dist": DIST,
        "fitnet": FitNet,
        "attention_transfer": AttentionTransfer,
        "similarity_preserving": SimilarityPreserving,
        "relational_kd": RelationalKD,
    }
)


def available(kind: type[Loss] = Loss) -> dict[str, str]:
    """Return the names that ``build`` knows, each with one line about the loss.

    Args:
        kind: ``DistillationLoss``, ``BatchLoss`` or ``FeatureLoss`` for those only.
    """
    return REGISTRY.available(kind)


def build(name: str, **params: Any) -> DistillationLoss | BatchLoss | FeatureLoss:
    """Build a loss by name.

    Args:
        name: one of ``available()``.
        params: the parameters of its constructor; with ``standardise=True`` a loss between two models' logits sees them
            standardised (MLKD in its instance term only).

    Raises:
        LossError: there is no such loss or parameter, or a value is out of range.
    """
    return REGISTRY.build(name, params)
