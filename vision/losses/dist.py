"""DIST: correlates the student's probabilities with the teacher's, along images and along classes."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm

from vlm_distill.losses import BatchLoss
from vlm_distill.losses.parameters import check_number
from vlm_distill.losses.softmax import upcast

# Added to the product of the norms in the authors' code; noticeable where a column has little mass.
_EPS = 1e-8


class DIST(BatchLoss):
    """DIST, τ²·(β·(1 − mean of rows' correlations) + γ·(1 − mean of columns')) (Huang et al., NeurIPS 2022).

    Rows and columns are those of the matrices of both models' probabilities ``[N, C]`` at temperature τ: a row holds an
    image's classes (inter-class relation), a column holds a class's images in the batch (intra-class relation).

    Args:
        beta: weight of the relation between classes.
        gamma: weight of the relation within classes.
        tau: temperature.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0) -> None:
        super().__init__()
        self.beta = check_number("loss dist: beta", beta, 0.0)
        self.gamma = check_number("loss dist: gamma", gamma, 0.0)
        self.tau = check_number("loss dist: tau", tau, 0.0, above=True)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
        q = (upcast(student_logits) / self.tau).softmax(-1)
        p = (upcast(teacher_logits) / self.tau).softmax(-1)
        inter = 1.0 - _correlation(q, p, -1).mean()
        intra = 1.0 - _correlation(q, p, 0).mean()
        return self.tau**2 * (self.beta * inter + self.gamma * intra)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Compute Pearson's correlation along a dimension; 0 with no gradient if one of the two is constant."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return (a * b).sum(dim) / (vector_norm(a, dim=dim) * vector_norm(b, dim=dim) + _EPS)
