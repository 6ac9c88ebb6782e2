"""Measure how a student spends its probability mass, without training it."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult
from .softmax import entropy, relative_entropy_, softmax_, upcast

_HEAD_TOKENS, _TAIL_SHARE = 10, 0.2
# Halvings of the range of log T, from e^-6 to e^6: to a relative 1e-5.
_RANGE, _HALVINGS = 6.0, 20


class Diagnostics(DistillationLoss):
    """Measures teacher and student at every step; loss and gradient are 0, whatever its weight.

    Logs, as means over the distilled tokens of a step:

    - ``kl``: KL(p‖q) to the teacher; ``teacher_entropy``, ``student_entropy``: nats;
    - ``head_mass``: the student's mass on the teacher's 10 likeliest tokens;
    - ``tail_mass``: its mass on the fifth of the vocabulary that the teacher finds least likely (both as in table 3 of
      Shing et al., TAID, 2025);
    - ``agreement``: how often both find the same token likeliest;
    - ``temperature``: at which the teacher's distribution would have the student's entropy (within e^±6); above 1 the
      student is less certain than its teacher.
    """

    signals = ("kl", "teacher_entropy", "student_entropy", "head_mass", "tail_mass", "agreement", "temperature")
    scratch = 10

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        return (0.0 * upcast(student_logits).nan_to_num()).sum(-1)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        agreement = (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype)
        order = teacher.argsort(-1, descending=True)
        teacher_logits_kept = teacher.clone()
        p, q = softmax_(teacher), softmax_(student)
        ordered = q.probs.gather(-1, order)
        student_entropy = entropy(q.log_probs, q.probs)
        signals = {
            "teacher_entropy": entropy(p.log_probs, p.probs),
            "student_entropy": student_entropy,
            "head_mass": ordered[:, :_HEAD_TOKENS].sum(-1),
            "tail_mass": ordered[:, round(ordered.shape[-1] * (1.0 - _TAIL_SHARE)) :].sum(-1),
            "agreement": agreement,
            "temperature": _temperature(teacher_logits_kept, student_entropy),
            "kl": relative_entropy_(p, q)[0],
        }
        return RowResult(torch.zeros_like(student_entropy), None, signals)


def _temperature(logits: Tensor, wanted: Tensor) -> Tensor:
    """Find the temperature at which each row's softmax has the wanted entropy, by bisection: entropy grows with it."""
    low, high = torch.full_like(wanted, -_RANGE), torch.full_like(wanted, _RANGE)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        log_probs = (logits / middle.exp().unsqueeze(-1)).log_softmax(-1)
        above = entropy(log_probs, log_probs.exp()) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low + high) / 2).exp()
