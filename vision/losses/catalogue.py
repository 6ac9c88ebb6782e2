"""The losses that a classifier's configuration can name, described without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_distill import losses
from vlm_distill.losses import Entry, Registry
from vlm_distill.losses.registry import TARGETS

if TYPE_CHECKING:
    from vlm_distill.losses import BatchLoss, DistillationLoss, FeatureLoss, Loss

#: Those on logits are the other path's, but for cross-entropy.
REGISTRY: Registry[DistillationLoss | BatchLoss | FeatureLoss] = Registry(
    {
        **{name: entry for name, entry in losses.REGISTRY.entries.items() if entry.classes},
        "cross_entropy": Entry("vision.losses.label_cross_entropy:CrossEntropy", ("label_smoothing",), needs=TARGETS),
        "hard_labels": Entry("vision.losses.hard_labels:HardLabels"),
        "mlkd": Entry("vision.losses.mlkd:MLKD", ("temperatures", "variant", "standardise")),
        "dist": Entry("vision.losses.dist:DIST", ("beta", "gamma", "tau")),
        "fitnet": Entry("vision.losses.stage_features:FitNet", ("layers", "relu")),
        "attention_transfer": Entry("vision.losses.stage_features:AttentionTransfer", ("layers",)),
        "similarity_preserving": Entry("vision.losses.stage_features:SimilarityPreserving", ("layers",)),
        "relational_kd": Entry("vision.losses.stage_features:RelationalKD", ("distance", "angle")),
    }
)


def available(kind: type[Loss] | None = None) -> dict[str, str]:
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
