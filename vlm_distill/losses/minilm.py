"""MiniLM: relations between tokens in the last layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import LossError
from .feature_loss import FeatureLoss, Shape
from .softmax import upcast


class MiniLM(FeatureLoss):
    """KL between the relations of the last layers' queries, keys and values (MiniLMv2, Wang et al., 2021).

    A relation is softmax(x xᵀ/√d) between a sample's distilled tokens, for each of ``relation_heads`` equal parts of x,
    the queries (keys, values) of all heads side by side; heads and widths may differ between the models. A token's loss
    is the sum over the three of KL(teacher‖student), each a mean over the parts. There is no causal mask, since nothing
    is predicted.

    Args:
        relation_heads: number of parts; must divide all widths, with shared keys also that of the keys.
    """

    student_features = teacher_features = ("queries", "keys", "values")

    def __init__(self, relation_heads: int = 8) -> None:
        super().__init__()
        if not isinstance(relation_heads, int) or isinstance(relation_heads, bool) or relation_heads < 1:
            raise LossError(f"loss minilm: relation_heads is {relation_heads!r}; give a whole number of at least 1")
        self.relation_heads = relation_heads

    def prepare(self, student: Mapping[str, Shape], teacher: Mapping[str, Shape]) -> None:
        widths = []
        for role, shapes in (("student", student), ("teacher", teacher)):
            for name in self.student_features:
                widths.append((role, name, shapes[name][1]))
        for role, name, width in widths:
            if width % self.relation_heads:
                most = math.gcd(*(width for _, _, width in widths))
                raise LossError(
                    f"loss minilm: {self.relation_heads} relation_heads do not divide the {role}'s {name} of width "
                    f"{width}; give a divisor of {most}"
                )

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        # Put samples of any length into one padded tensor: [samples, longest].
        _, sample, counts = samples.unique_consecutive(return_inverse=True, return_counts=True)
        place = torch.arange(len(samples), device=samples.device) - (counts.cumsum(0) - counts)[sample]
        real = torch.arange(max(counts.tolist(), default=0), device=samples.device) < counts.unsqueeze(1)
        summands = []
        for name in self.student_features:
            mine = upcast(student[name])
            log_q = self._relation(mine, sample, place, real)
            log_p = self._relation(teacher[name].to(mine.dtype), sample, place, real)
            divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True)
            summands.append(divergence.sum(-1).mean(1)[sample, place])
        return torch.stack(summands).sum(0)

    def _relation(self, x: Tensor, sample: Tensor, place: Tensor, real: Tensor) -> Tensor:
        """Compute relations as log-probabilities ``[samples, parts, longest, longest]`` over a sample's real tokens.

        Args:
            x: ``[n, width]``, queries, keys or values.
            sample: int64 ``[n]``, which sample each token belongs to.
            place: int64 ``[n]``, its number within the sample.
            real: bool ``[samples, longest]``, false for padding.
        """
        parts = x.unflatten(-1, (self.relation_heads, -1))
        padded = x.new_zeros(*real.shape, *parts.shape[1:]).index_put((sample, place), parts).transpose(1, 2)
        scores = padded @ padded.transpose(-1, -2) / math.sqrt(padded.shape[-1])
        # Not −∞: the padding's own rows would become NaN before they are dropped.
        return scores.masked_fill(~real[:, None, None, :], torch.finfo(x.dtype).min).log_softmax(-1)
