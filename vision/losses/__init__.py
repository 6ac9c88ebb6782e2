"""What pulls one classifier to another: the losses on logits of vlm_distill, those of a batch, and of features."""

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

#: The losses that a classifier's configuration may name.
REGISTRY: Registry[DistillationLoss | BatchLoss | FeatureLoss] = Registry(
    {
        # Not the loss between tokenizers: classifiers' classes are mapped before there is a loss.
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
    """The names that ``build`` knows, each with one line about the loss.

    Args:
        kind: ``DistillationLoss``, ``BatchLoss`` or ``FeatureLoss`` for those alone.
    """
    return REGISTRY.available(kind)


def build(name: str, **params: Any) -> DistillationLoss | BatchLoss | FeatureLoss:
    """A loss by its name.

    Args:
        name: one of ``available()``.
        params: the parameters of its constructor; ``standardise=True`` lets a loss between two models' logits see them
            standardised (of MLKD its instance term alone).

    Raises:
        LossError: there is no such loss or parameter, or a value is out of its range.
    """
    return REGISTRY.build(name, params)
