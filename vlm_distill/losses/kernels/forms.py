"""The losses that the kernels know: ten ways to compare a target's logits x with the student's y."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

#: Two probabilities within this many units in the last place count as equal. In float32, the same logits computed
#: in two ways gave differences of up to 129 (vocabularies of 1,000 to 152,000, logits with deviations of 0.1 to 20).
ROUNDING = 256

#: A log-probability whose powers underflow, at the exponents of the alpha-beta kernel (0.05 or more).
ALPHA_BETA_FLOOR = -1e5


def agree(p: Tensor, q: Tensor) -> Tensor:
    """Return a mask of where two tensors of probabilities are equal but for rounding."""
    return (p - q).abs_() <= torch.maximum(p, q).mul_(ROUNDING * torch.finfo(p.dtype).eps)


class Kind(IntEnum):
    """How p, the target's probabilities, and q, the student's, are compared."""

    FORWARD_KL = 0
    REVERSE_KL = 1
    JSD = 2
    SKEW_FORWARD_KL = 3
    SKEW_REVERSE_KL = 4
    TVD = 5
    CROSS_ENTROPY = 6
    HELD_SKEW_REVERSE_KL = 7
    ALPHA_BETA = 8
    TODI = 9


# Their sums need both normalisers first.
_TWO_PASSES = tuple(kind for kind in Kind if kind not in (Kind.FORWARD_KL, Kind.REVERSE_KL, Kind.CROSS_ENTROPY))


class Source(IntEnum):
    """Whose logits the target is mixed from."""

    TEACHER = 0
    STUDENT = 1
    BOTH = 2


class Form(NamedTuple):
    """A loss as the kernels compute it: ``factor`` times a comparison of softmax(x) with softmax(y).

    Attributes:
        kind: the comparison.
        share: β of the JSD, α of the skew KLs and of the alpha-beta divergence.
        temperature: divides x and y.
        factor: multiplies the loss.
        t: the teacher's share in the target, x = (1−t)·student + t·teacher, with the student's part held fixed. At 0
            and 1 the other model's logits are not read.
        beta: β of the alpha-beta divergence.
        slope: whether to accumulate the variance of log p/q as well, TAID's signal ``slope``.
    """

    kind: Kind
    share: float = 0.0
    temperature: float = 1.0
    factor: float = 1.0
    t: float = 1.0
    beta: float = 0.0
    slope: bool = False

    @property
    def mixed(self) -> bool:
        """Whether the loss's sum needs both normalisers and so a second pass, as where it compares with a mixture."""
        return self.kind in _TWO_PASSES

    @property
    def source(self) -> Source:
        """Whose logits are read."""
        if self.t == 1.0:
            return Source.TEACHER
        return Source.STUDENT if self.t == 0.0 else Source.BOTH
