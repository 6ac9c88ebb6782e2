"""Which losses the kernels know: a target x and the student y, both as logits, and seven ways to compare them."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

#: Up to so many units in the last place two probabilities are taken as equal: in float32 those of the same logits,
#: computed in two ways, were up to 129 apart (vocabularies of 1,000 to 152,000, logits of deviation 0.1 to 20).
ROUNDING = 256


def agree(p: Tensor, q: Tensor) -> Tensor:
    """Return where two tensors of probabilities are equal but for rounding, as a mask of their shape."""
    return (p - q).abs_() <= torch.maximum(p, q).mul_(ROUNDING * torch.finfo(p.dtype).eps)


class Kind(IntEnum):
    """With p the target's probabilities and q the student's; m is the mixture that each loss's definition names."""

    FORWARD_KL = 0
    REVERSE_KL = 1
    JSD = 2
    SKEW_FORWARD_KL = 3
    SKEW_REVERSE_KL = 4
    TVD = 5
    CROSS_ENTROPY = 6


class Source(IntEnum):
    """Whose logits the target is made of."""

    TEACHER = 0
    STUDENT = 1
    BOTH = 2


class Form(NamedTuple):
    """A loss as the kernels compute it: ``factor`` times a comparison of softmax(x) and softmax(y).

    Attributes:
        kind: the comparison.
        share: β of the JSD, α of the skew KLs.
        temperature: divides x and y.
        factor: multiplies the loss.
        t: the teacher's share in the target, x = (1−t)·student + t·teacher, the student in it held fixed. At 1 and at
            0 the other model's logits are not read.
        slope: whether the variance of log p/q is gathered, too, TAID's signal of that name.
    """

    kind: Kind
    share: float = 0.0
    temperature: float = 1.0
    factor: float = 1.0
    t: float = 1.0
    slope: bool = False

    @property
    def mixed(self) -> bool:
        """Whether the rows' sums need both normalisers first, and so a pass of their own."""
        return self.kind in (Kind.JSD, Kind.SKEW_FORWARD_KL, Kind.SKEW_REVERSE_KL, Kind.TVD)

    @property
    def source(self) -> Source:
        if self.t == 1.0:
            return Source.TEACHER
        return Source.STUDENT if self.t == 0.0 else Source.BOTH
