"""The losses that a vision-language model's configuration can name, described without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from .errors import LossError
from .registry import PLUGINS, TARGETS, TEACHER, Entry, Registry, check_class, make

if TYPE_CHECKING:
    from .base import DistillationLoss, Loss
    from .divergence import Divergence
    from .feature_loss import FeatureLoss

REGISTRY: Registry[DistillationLoss | FeatureLoss] = Registry(
    {
        "taid": Entry(
            "vlm_distill.losses.taid:TAID",
            ("t_start", "t_end", "alpha", "beta", "schedule", "rate", "divergence", "power", "target_entropy"),
        ),
        "forward_kl": Entry("vlm_distill.losses.forward_kl:ForwardKL", ("temperature",), compares=True),
        "reverse_kl": Entry("vlm_distill.losses.reverse_kl:ReverseKL", ("temperature",), compares=True),
        "jsd": Entry("vlm_distill.losses.jsd:JSD", ("beta", "temperature", "convention"), compares=True),
        "skew_forward_kl": Entry(
            "vlm_distill.losses.skew_kl:SkewForwardKL", ("alpha", "temperature", "adaptive"), compares=True
        ),
        "skew_reverse_kl": Entry(
            "vlm_distill.losses.skew_kl:SkewReverseKL", ("alpha", "temperature", "hold", "adaptive"), compares=True
        ),
        "tvd": Entry("vlm_distill.losses.tvd:TVD", ("temperature",), compares=True),
        "adaptive_kl": Entry(
            "vlm_distill.losses.adaptive_kl:AdaptiveKL", ("mu", "temperature", "convention"), compares=True
        ),
        "alpha_beta": Entry(
            "vlm_distill.losses.alpha_beta:AlphaBeta", ("alpha", "beta", "temperature", "convention"), compares=True
        ),
        "todi": Entry("vlm_distill.losses.todi:ToDi", ("temperature",), compares=True),
        "amid": Entry("vlm_distill.losses.amid:AMiD", ("alpha", "mix", "order", "hold", "temperature"), compares=True),
        "kd": Entry("vlm_distill.losses.forward_kl:KD", ("temperature",)),
        "dkd": Entry("vlm_distill.losses.dkd:DKD", ("alpha", "beta", "temperature"), needs=TARGETS | TEACHER),
        "ctkd": Entry(
            "vlm_distill.losses.ctkd:CTKD",
            ("t_start", "t_range", "g", "loops", "decay", "grl_coefficient", "instance", "width"),
        ),
        "uld": Entry("vlm_distill.losses.uld:ULD", ("temperature", "tokens"), classes=False),
        "alm": Entry("vlm_distill.losses.alm:ALM", ("tau", "distance"), classes=False),
        "policy_gradient": Entry("vlm_distill.losses.policy_gradient:PolicyGradient", ("clip",), classes=False),
        "overlap_kl": Entry("vlm_distill.losses.overlap_kl:OverlapKL", ("divergence", "temperature"), classes=False),
        "cross_entropy": Entry("vlm_distill.losses.token_cross_entropy:CrossEntropy", needs=TARGETS),
        "hidden_states": Entry(
            "vlm_distill.losses.feature_distances:HiddenStates", ("layers", "distance"), classes=False
        ),
        "vision_features": Entry(
            "vlm_distill.losses.feature_distances:VisionFeatures", ("distance",), classes=False, matches=True
        ),
        "projector_features": Entry(
            "vlm_distill.losses.feature_distances:ProjectorFeatures", ("distance",), classes=False, matches=True
        ),
        "minilm": Entry("vlm_distill.losses.minilm:MiniLM", ("relation_heads",), classes=False),
        "vision_relation": Entry("vlm_distill.losses.vision_relation:VisionRelation", classes=False, matches=True),
        "vision_language_affinity": Entry(
            "vlm_distill.losses.vision_language_affinity:VisionLanguageAffinity", ("text",), classes=False, matches=True
        ),
        "visual_attention": Entry(
            "vlm_distill.losses.visual_attention:VisualAttention", ("layers", "queries"), classes=False
        ),
        "diagnostics": Entry("vlm_distill.losses.diagnostics:Diagnostics"),
    }
)


def available(kind: type[Loss] | None = None) -> dict[str, str]:
    """Return the names that ``build`` knows, each with one line about the loss.

    Args:
        kind: ``DistillationLoss`` or ``FeatureLoss`` for those only.
    """
    return REGISTRY.available(kind)


def build(name: str, **params: Any) -> DistillationLoss | FeatureLoss:
    """Build a loss by name.

    Args:
        name: one of ``available()``, or a plug-in's ``package.module:Class``.
        params: the parameters of its constructor, such as ``t_start`` or ``temperature``; with ``standardise=True`` a
            loss between two models' logits sees them standardised.

    Raises:
        LossError: there is no such loss or parameter, or a value is out of range.
    """
    return REGISTRY.build(name, params)


def register(name: str, kind: type[Loss]) -> None:
    """Make a loss known by a name, for all configurations and calls of this process.

    Args:
        name: letters, digits, ``_`` and ``-``.
        kind: its class, derived from ``DistillationLoss``, ``FeatureLoss`` or ``BatchLoss``.

    Raises:
        LossError: the name is taken, or the class is not a loss.
    """
    check_class(name, kind)
    PLUGINS.register(name, kind)


def build_divergence(where: str, given: str | Mapping[str, Any]) -> Divergence:
    """Build a divergence from its name, or from a mapping with its name and parameters.

    Args:
        where: the loss and the parameter, for messages.
        given: as in the configuration.

    Raises:
        LossError: there is no such divergence or parameter, or a value is out of range.
    """
    name, params = REGISTRY.divergence(where, given)
    kind = REGISTRY.load(name)
    if not REGISTRY.entry(name).compares:
        raise LossError(f"{where} {name} is not a divergence; derive its class from vlm_distill.losses.Divergence")
    try:
        divergence = cast("Divergence", make(kind, f"{where} {name}", params))
    except LossError as error:
        raise LossError(str(error).replace(f"loss {name}:", f"{where} {name}:", 1)) from None
    if divergence.adapts:
        raise LossError(f"{where} {name}: adaptive is for a term of its own; leave it out")
    return divergence
