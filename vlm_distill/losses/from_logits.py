"""A weighted sum of losses from whole logits, for classifiers, whose few classes need no chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import DistillationLoss, Term
from .sums import LossSums, Sums, check_same, check_terms, separate, with_gradients


# The terms compute in place and without autograd: nothing for torch.compile.
@torch.compiler.disable
def on_logits(
    terms: Sequence[Term] | DistillationLoss,
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    scales: Mapping[str, float] | None = None,
) -> LossSums:
    """Compute sums of losses over rows of logits, and their gradient by the losses' closed forms.

    Computes in float32, or in float64 if the student's logits are float64; changes neither model's logits. Nothing is
    computed for gradients that are switched off.

    Args:
        terms: the summands; a single loss becomes a term called "loss".
        student_logits: ``[N, C]``, any floating dtype; N may be 0.
        teacher_logits: ``[N, C]``; optional if no term needs a teacher.
        targets: int64 ``[N]``, or whatever the terms accept as targets; optional if no term needs them.
        scales: a factor for each term's sum, by name; 1 for the others.

    Returns:
        ``loss`` = Σ over terms of weight · scale · sum over the rows. It belongs to the graph even if N is 0. There are
        no second derivatives.

    Raises:
        ValueError: no terms, two with one name, or a term that needs what was not given; or the models differ in rows
            or classes.
    """
    if isinstance(terms, DistillationLoss):
        terms = [Term("loss", terms)]
    check_terms(terms, teacher=teacher_logits, targets=targets)
    if not any(term.has_teacher for term in terms):
        teacher_logits = None
    if teacher_logits is not None:
        check_same("rows", len(student_logits), len(teacher_logits))
        check_same("classes", student_logits.shape[1], teacher_logits.shape[1])
    recording = torch.is_grad_enabled()
    with torch.autocast(student_logits.device.type, enabled=False):
        learned = {term.name: term.loss.learned_tensors() for term in terms}
        inputs = [student_logits]
        for tensors in learned.values():
            inputs.extend(tensors)
        wanted = recording and any(x.requires_grad for x in inputs)
        with torch.no_grad():
            dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
            # Copies that the terms may overwrite.
            student = student_logits.detach().to(dtype, copy=True)
            teacher = None if teacher_logits is None else teacher_logits.detach().to(dtype, copy=True)
            work = Sums(terms, scales or {}, student.new_zeros(()), grad=wanted)
            work.expect_learned(learned, dtype)
            if len(student):
                results = [
                    term.loss.loss_and_grad(own, other, targets, grad=work.trains(term))
                    for term, own, other in separate(work.terms, student, teacher)
                ]
                work.add(work.terms, results, student)
            total = work.total()
        if wanted:
            total = with_gradients(total, [student, *work.learned_gradients()], inputs)
    return LossSums(total, work.sums)
