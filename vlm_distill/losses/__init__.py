"""Distillation losses by name, and the path from hidden states to their sums without whole logits.

Needs torch and nothing else of this project, so it can be used inside any other. Torch is imported once something is
used that needs it: commands check losses by name without it. To add a loss, write its class in a file of its own and
list it in ``catalogue.py``; ``plugins.py`` finds those of other packages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .catalogue import REGISTRY, available, build, register
from .errors import LossError
from .registry import PLUGINS, Entry, Registry, term_name

if TYPE_CHECKING:
    from .adaptive_kl import AdaptiveKL
    from .alm import ALM
    from .alpha_beta import AlphaBeta
    from .amid import AMiD
    from .base import BatchLoss, DistillationLoss, Loss, Match, Progress, RowResult, Term
    from .ctkd import CTKD
    from .diagnostics import Diagnostics
    from .divergence import Divergence
    from .dkd import DKD
    from .feature_distances import HiddenStates, ProjectorFeatures, VisionFeatures
    from .feature_loss import (
        IMAGE_HIDDEN,
        TEXT_HIDDEN,
        TEXT_SAMPLES,
        FeatureLoss,
        FeatureTerm,
        matches_tokens,
        must_be_alike,
        wanted_features,
    )
    from .forward_kl import KD, ForwardKL
    from .from_hidden import fused_linear
    from .from_logits import on_logits
    from .groups import TokenGroups
    from .heads import HiddenTargets, MixedTargets
    from .jsd import JSD
    from .minilm import MiniLM
    from .overlap_kl import OverlapKL
    from .policy_gradient import PolicyGradient
    from .reverse_kl import ReverseKL
    from .sequences import adapt_terms, sequence_weights
    from .skew_kl import SkewForwardKL, SkewReverseKL
    from .standardise import Standardised
    from .sums import LossSums, TermSums
    from .taid import TAID
    from .todi import ToDi
    from .token_cross_entropy import CrossEntropy
    from .token_targets import TokenTargets
    from .topk import TopKTargets
    from .tvd import TVD
    from .uld import ULD
    from .vision_language_affinity import VisionLanguageAffinity
    from .vision_relation import VisionRelation
    from .visual_attention import AttentionFeature, VisualAttention

__all__ = [
    "ALM",
    "CTKD",
    "DKD",
    "IMAGE_HIDDEN",
    "JSD",
    "KD",
    "PLUGINS",
    "REGISTRY",
    "TAID",
    "TEXT_HIDDEN",
    "TEXT_SAMPLES",
    "TVD",
    "ULD",
    "AMiD",
    "AdaptiveKL",
    "AlphaBeta",
    "AttentionFeature",
    "BatchLoss",
    "CrossEntropy",
    "Diagnostics",
    "DistillationLoss",
    "Divergence",
    "Entry",
    "FeatureLoss",
    "FeatureTerm",
    "ForwardKL",
    "HiddenStates",
    "HiddenTargets",
    "Loss",
    "LossError",
    "LossSums",
    "Match",
    "MiniLM",
    "MixedTargets",
    "OverlapKL",
    "PolicyGradient",
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
    "ToDi",
    "TokenGroups",
    "TokenTargets",
    "TopKTargets",
    "VisionFeatures",
    "VisionLanguageAffinity",
    "VisionRelation",
    "VisualAttention",
    "adapt_terms",
    "available",
    "build",
    "fused_linear",
    "matches_tokens",
    "must_be_alike",
    "on_logits",
    "register",
    "sequence_weights",
    "term_name",
    "wanted_features",
]

#: Where the names are that need torch.
_HOMES = {
    "adaptive_kl": "AdaptiveKL",
    "alm": "ALM",
    "alpha_beta": "AlphaBeta",
    "amid": "AMiD",
    "base": "BatchLoss DistillationLoss Loss Match Progress RowResult Term",
    "ctkd": "CTKD",
    "diagnostics": "Diagnostics",
    "divergence": "Divergence",
    "dkd": "DKD",
    "feature_distances": "HiddenStates ProjectorFeatures VisionFeatures",
    "feature_loss": "IMAGE_HIDDEN TEXT_HIDDEN TEXT_SAMPLES FeatureLoss FeatureTerm matches_tokens must_be_alike "
    "wanted_features",
    "forward_kl": "KD ForwardKL",
    "from_hidden": "fused_linear",
    "groups": "TokenGroups",
    "heads": "HiddenTargets MixedTargets",
    "jsd": "JSD",
    "minilm": "MiniLM",
    "overlap_kl": "OverlapKL",
    "policy_gradient": "PolicyGradient",
    "from_logits": "on_logits",
    "reverse_kl": "ReverseKL",
    "sequences": "adapt_terms sequence_weights",
    "skew_kl": "SkewForwardKL SkewReverseKL",
    "standardise": "Standardised",
    "sums": "LossSums TermSums",
    "taid": "TAID",
    "todi": "ToDi",
    "token_cross_entropy": "CrossEntropy",
    "token_targets": "TokenTargets",
    "topk": "TopKTargets",
    "tvd": "TVD",
    "uld": "ULD",
    "vision_language_affinity": "VisionLanguageAffinity",
    "vision_relation": "VisionRelation",
    "visual_attention": "AttentionFeature VisualAttention",
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
