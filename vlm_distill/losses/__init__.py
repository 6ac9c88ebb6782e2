"""What pulls the student to the teacher: losses by name, and the chunked path from hidden states to their sums."""

from __future__ import annotations

from typing import Any

from .base import BatchLoss, DistillationLoss, Loss, Progress, RowResult, Term
from .ctkd import CTKD
from .diagnostics import Diagnostics
from .divergences import JSD, KD, TVD, AdaptiveKL, CrossEntropy, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL
from .dkd import DKD
from .errors import LossError
from .features import (
    FeatureLoss,
    FeatureTerm,
    HiddenStates,
    MiniLM,
    ProjectorFeatures,
    VisionFeatures,
    wanted_features,
)
from .fused_linear import HiddenTargets, fused_linear
from .groups import TokenGroups
from .on_logits import on_logits
from .registry import Registry
from .standardise import Standardised
from .sums import LossSums, TermSums
from .taid import TAID
from .topk import TopKTargets
from .uld import ULD

__all__ = [
    "CTKD",
    "DKD",
    "JSD",
    "KD",
    "REGISTRY",
    "TAID",
    "TVD",
    "ULD",
    "AdaptiveKL",
    "BatchLoss",
    "CrossEntropy",
    "Diagnostics",
    "DistillationLoss",
    "FeatureLoss",
    "FeatureTerm",
    "ForwardKL",
    "HiddenStates",
    "HiddenTargets",
    "Loss",
    "LossError",
    "LossSums",
    "MiniLM",
    "Progress",
    "ProjectorFeatures",
    "Registry",
    "ReverseKL",
    "RowResult",
    "SkewForwardKL",
    "SkewReverseKL",
    "Standardised",
    "Term",
    "TermSums",
    "TokenGroups",
    "TopKTargets",
    "VisionFeatures",
    "available",
    "build",
    "fused_linear",
    "on_logits",
    "wanted_features",
]

#: The losses that a vision-language model's configuration may name.
REGISTRY: Registry[DistillationLoss | FeatureLoss] = Registry(
    {
        "taid": TAID,
        "forward_kl": ForwardKL,
        "reverse_kl": ReverseKL,
        "jsd": JSD,
        "skew_forward_kl": SkewForwardKL,
        "skew_reverse_kl": SkewReverseKL,
        "tvd": TVD,
        "adaptive_kl": AdaptiveKL,
        "kd": KD,
        "dkd": DKD,
        "ctkd": CTKD,
        "uld": ULD,
        "cross_entropy": CrossEntropy,
        "hidden_states": HiddenStates,
        "vision_features": VisionFeatures,
        "projector_features": ProjectorFeatures,
        "minilm": MiniLM,
        "diagnostics": Diagnostics,
    }
)


def available(kind: type[Loss] = Loss) -> dict[str, str]:
    """The names that ``build`` knows, each with one line about the loss.

    Args:
        kind: ``DistillationLoss`` or ``FeatureLoss`` for those alone.
    """
    return REGISTRY.available(kind)


def build(name: str, **params: Any) -> DistillationLoss | FeatureLoss:
    """A loss by its name.

    Args:
        name: one of ``available()``.
        params: the parameters of its constructor, such as ``t_start`` or ``temperature``; ``standardise=True`` lets a
            loss between two models' logits see them standardised.

    Raises:
        LossError: there is no such loss or parameter, or a value is out of its range.
    """
    return REGISTRY.build(name, params)
