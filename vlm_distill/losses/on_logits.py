"""A weighted sum of losses from logits that exist as a whole: classifiers, whose few classes need no chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult, Term
from .sums import LossSums, Sums, check_same, check_terms, with_gradients


# What the terms compute is in place and without autograd: nothing for torch.compile.
@torch.compiler.disable
def on_logits(
    terms: Sequence[Term] | DistillationLoss,
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    scales: Mapping[str, float] | None = None,
) -> LossSums:
    """Sums of losses over rows of logits, with the gradient already made by the losses' closed forms.

    Computed in float32, in float64 where the student's logits are float64; neither model's logits are changed. No work
    is done for gradients while they are switched off.

    Args:
        terms: the summands; a lone loss counts as a term called "loss".
        student_logits: ``[N, C]``, any floating dtype; N may be 0.
        teacher_logits: ``[N, C]``; may be ``None`` if no term needs a teacher.
        targets: int64 ``[N]`` (or what else the terms take for targets); may be ``None`` if no term needs them.
        scales: a factor for each term's sum, by name; 1 where none is given.

    Returns:
        ``loss`` = Σ over terms of weight · scale · sum over the rows. It hangs in the graph also when N is 0. There
        are no second derivatives.

    Raises:
        ValueError: no terms, two of one name, one that needs a teacher or targets where there are none; or teacher and
            student differ in rows or classes.
    """
    if isinstance(terms, DistillationLoss):
        terms = [Term("loss", terms)]
    check_terms(terms, teacher=teacher_logits, targets=targets)
    if not any("teacher" in term.loss.needs for term in terms):
        teacher_logits = None
    if teacher_logits is not None:
        check_same("rows", len(student_logits), len(teacher_logits))
        check_same("classes", student_logits.shape[1], teacher_logits.shape[1])
    recording = torch.is_grad_enabled()
    with torch.autocast(student_logits.device.type, enabled=False):
        learned = {term.name: term.loss.learned() for term in terms}
        inputs = (student_logits, *(value for values in learned.values() for value in values))
        wanted = recording and any(x.requires_grad for x in inputs)
        with torch.no_grad():
            dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
            # Copies, which the terms may overwrite.
            student = student_logits.detach().to(dtype, copy=True)
            teacher = None if teacher_logits is None else teacher_logits.detach().to(dtype, copy=True)
            work = Sums(terms, scales or {}, student.new_zeros(()), grad=wanted)
            work.expect_learned(learned, dtype)

            def evaluate(term: Term, own: Tensor, other: Tensor | None, grad: bool) -> RowResult:
                return term.loss.loss_and_grad(own, other, targets, grad=grad)

            if len(student):
                work.add_block(work.terms, student, teacher, evaluate)
            total = work.total()
        if wanted:
            made = [student, *(value for values in work.learned.values() for value in values)]
            total = with_gradients(total, made, inputs)
    return LossSums(total, work.sums)
