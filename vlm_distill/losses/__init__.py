"""What pulls the student to the teacher: losses by name, and the chunked path from hidden states to their sums."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from data.errors import UserError

from .base import BatchLoss, DistillationLoss, Loss, Progress, RowResult, Term
from .ctkd import CTKD
from .diagnostics import Diagnostics
from .divergences import JSD, KD, TVD, AdaptiveKL, CrossEntropy, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL
from .dkd import DKD
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
from .on_logits import on_logits
from .sums import LossSums, TermSums
from .taid import TAID
from .topk import TopKTargets
from .uld import ULD

__all__ = [
    "CTKD",
    "DKD",
    "JSD",
    "KD",
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
    "LossSums",
    "MiniLM",
    "Progress",
    "ProjectorFeatures",
    "ReverseKL",
    "RowResult",
    "SkewForwardKL",
    "SkewReverseKL",
    "Term",
    "TermSums",
    "TopKTargets",
    "VisionFeatures",
    "available",
    "build",
    "fused_linear",
    "on_logits",
    "wanted_features",
]

_LOSSES: dict[str, type[DistillationLoss] | type[FeatureLoss]] = {
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


def available(kind: type[Loss] = Loss) -> dict[str, str]:
    """The names that ``build`` knows, each with one line about the loss.

    Args:
        kind: ``DistillationLoss`` or ``FeatureLoss`` for those alone.
    """
    known = {name: loss for name, loss in _LOSSES.items() if issubclass(loss, kind)}
    return {name: (inspect.getdoc(loss) or "").splitlines()[0] for name, loss in known.items()}


def build(name: str, **params: Any) -> DistillationLoss | FeatureLoss:
    """A loss by its name.

    Args:
        name: one of ``available()``.
        params: the parameters of its constructor, such as ``t_start`` or ``temperature``.

    Raises:
        UserError: there is no such loss or parameter, or a value is out of its range.
    """
    if name not in _LOSSES:
        raise UserError(f"no loss is called {name!r}{_nearest(name, _LOSSES)}; there are {', '.join(_LOSSES)}")
    known = list(inspect.signature(_LOSSES[name]).parameters)
    for param in params:
        if param not in known:
            listed = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"loss {name} has no parameter {param!r}{_nearest(param, known)}; {listed}")
    return _LOSSES[name](**params)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
