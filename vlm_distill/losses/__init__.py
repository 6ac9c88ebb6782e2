"""Distillation losses by name, and the path from hidden states to their sums without whole logits.

Needs torch and nothing else of this project, so it can be used inside any other. To add a loss: write its class in a
file of its own and list it in ``REGISTRY``.
"""

from __future__ import annotations

from typing import Any

from .adaptive_kl import AdaptiveKL
from .base import BatchLoss, DistillationLoss, Loss, Progress, RowResult, Term
from .ctkd import CTKD
from .diagnostics import Diagnostics
from .dkd import DKD
from .errors import LossError
from .feature_distances import HiddenStates, ProjectorFeatures, VisionFeatures
from .feature_loss import FeatureLoss, FeatureTerm, wanted_features
from .forward_kl import KD, ForwardKL
from .fused_linear import fused_linear
from .groups import TokenGroups
from .heads import HiddenTargets
from .jsd import JSD
from .minilm import MiniLM
from .on_logits import on_logits
from .registry import Registry
from .reverse_kl import ReverseKL
from .skew_kl import SkewForwardKL, SkewReverseKL
from .standardise import Standardised
from .sums import LossSums, TermSums
from .taid import TAID
from .token_cross_entropy import CrossEntropy
from .topk import TopKTargets
from .tvd import TVD
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

#: The losses that a vision-language model's configuration can name.
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
    """Return the names that ``build`` knows, each with one line about the loss.

    Args:
        kind: ``DistillationLoss`` or ``FeatureLoss`` for those only.
    """
    return REGISTRY.available(kind)


def build(name: str, **params: Any) -> DistillationLoss | FeatureLoss:
    """Build a loss by name.

    Args:
        name: one of ``available()``.
        params: the parameters of its constructor, such as ``t_start`` or ``temperature``; with ``standardise=True`` a
            loss between two models' logits sees them standardised.

    Raises:
        LossError: there is no such loss or parameter, or a value is out of range.
    """
    return REGISTRY.build(name, params)
