"""ClassificationTask: a classifier and its losses, the module that an engine steps. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm_distill.losses import BatchLoss, FeatureLoss, FeatureTerm, Term, TermSums, on_logits, wanted_features

from .classifier import Classifier, Outputs
from .device_views import Views


@dataclass(frozen=True)
class BatchTerm:
    """A term whose loss compares the rows of a batch with one another."""

    name: str
    loss: BatchLoss
    weight: float = 1.0


AnyTerm = Term | BatchTerm | FeatureTerm


class ClassificationTask(nn.Module):
    """A student and a weighted sum of losses.

    Losses with one value per row see every view of every image. If the student has a distillation head (DeiT), losses
    that need a teacher see that head's logits, and the others see the class head's.

    Args:
        student: its parameters that require gradients are trained.
        terms: the losses, by unique names, prepared.
        views: number of views of each image.
        gather: joins the rows ``[n, …]`` of all ranks, with gradients for this rank's own; ``None``: losses of a batch
            see this rank's rows alone.
    """

    def __init__(
        self,
        student: Classifier,
        terms: Sequence[AnyTerm],
        *,
        views: int = 1,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.views = views
        self.gather = gather
        self.row_terms = [term for term in terms if isinstance(term, Term)]
        self.batch_terms: list[BatchTerm | FeatureTerm] = [term for term in terms if isinstance(term, BatchTerm)]
        self.feature_terms: list[BatchTerm | FeatureTerm] = [term for term in terms if isinstance(term, FeatureTerm)]
        self.features = wanted_features([term for term in terms if isinstance(term, FeatureTerm)])[0]
        # Registered for their parameters and their state in checkpoints.
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})

    def read_parameters(self) -> list[nn.Parameter]:
        """Return parameters that ``forward`` reads without calling their module, as timm's methods for features do."""
        return list(self.student.model.parameters(recurse=False)) if self.features else []

    def forward(
        self,
        views: Views,
        teacher: Outputs | None,
        scales: Mapping[str, float] | None = None,
        *,
        real: bool = True,
    ) -> tuple[Tensor, dict[str, TermSums]]:
        """Compute the loss of a micro-batch and its terms.

        Args:
            views: V views of N > 0 images on this rank's device.
            teacher: the teacher's outputs for them, its classes in the student's order.
            scales: a factor for each term's sum over rows, by name; default 1.
            real: false if the images only stand in for an empty micro-batch: nothing is learnt from them.

        Returns:
            The differentiable weighted sum (0-d), and the detached sums of each term.
        """
        scales = scales or {}
        outputs = self.student(views.student, self.features)
        losses, sums = self._rows(outputs, teacher, views, scales)
        for term in self.batch_terms + self.feature_terms:
            assert teacher is not None
            with torch.autocast(views.student.device.type, enabled=False):
                if isinstance(term, BatchTerm):
                    loss, found = self._batch(term.loss, outputs, teacher, views.labels, real)
                else:
                    loss, found = self._compare(term.loss, outputs.features, teacher.features, real)
            losses.append(term.weight * scales.get(term.name, 1.0) * loss)
            sums[term.name] = found
        if not real:
            losses = [0.0 * loss for loss in losses]
            sums = {name: TermSums(0.0 * found.loss, 0, {}) for name, found in sums.items()}
        # A plain tuple: ZeRO-3 attaches its backward hooks to the tensors it finds in an output.
        return torch.stack(losses).sum(), sums

    def _rows(
        self, outputs: Outputs, teacher: Outputs | None, views: Views, scales: Mapping[str, float]
    ) -> tuple[list[Tensor], dict[str, TermSums]]:
        """Compute the terms with a value per row; terms that see the same logits and targets share a pass."""
        labels = views.labels.repeat(self.views)
        soft = None if views.soft is None else views.soft.repeat(self.views, 1)
        together: dict[tuple[bool, bool], list[Term]] = {}
        for term in self.row_terms:
            mixed = soft is not None and term.loss.soft_targets
            together.setdefault((self._distils(term, outputs), mixed), []).append(term)
        losses: list[Tensor] = []
        sums: dict[str, TermSums] = {}
        for (distilled, mixed), terms in together.items():
            logits = outputs.distilled if distilled else outputs.logits
            assert logits is not None
            given = None if teacher is None else teacher.logits
            found = on_logits(terms, logits, given, soft if mixed else labels, scales=scales)
            losses.append(found.loss)
            sums |= found.terms
        return losses, sums

    @staticmethod
    def _distils(term: Term, outputs: Outputs) -> bool:
        return outputs.distilled is not None and "teacher" in term.loss.needs

    def _batch(
        self, loss: BatchLoss, outputs: Outputs, teacher: Outputs, labels: Tensor, real: bool
    ) -> tuple[Tensor, TermSums]:
        """Return a batch loss times its number of rows, so that it adds up like sums over rows."""
        mine, other = outputs.logits if outputs.distilled is None else outputs.distilled, teacher.logits
        each = self.views if loss.views == 1 else 1
        count = each * len(labels)
        together = None if self.gather is None else self.gather(labels[: len(labels) * real])
        if self.gather is not None and together is not None and len(together):
            mine = self._gather_views(mine, len(labels) * real)
            other = self._gather_views(other, len(labels) * real)
            labels = together
        return self._times_rows(loss(mine, other, labels.repeat(each)), each * len(labels), count)

    def _gather_views(self, logits: Tensor, images: int) -> Tensor:
        """Join all ranks' logits view by view: the first views of all images come first, as on one rank."""
        assert self.gather is not None
        return torch.cat([self.gather(view[:images]) for view in logits.chunk(self.views)])

    def _compare(
        self, loss: FeatureLoss, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], real: bool
    ) -> tuple[Tensor, TermSums]:
        mine = {name: student[name] for name in loss.student_features}
        other = {name: teacher[name] for name in loss.teacher_features}
        rows = count = len(next(iter(mine.values())))
        if loss.whole_batch and self.gather is not None:
            of_student = {name: self.gather(values[: rows * real]) for name, values in mine.items()}
            of_teacher = {name: self.gather(values[: rows * real]) for name, values in other.items()}
            if found := len(next(iter(of_student.values()))):
                mine, other, rows = of_student, of_teacher, found
        value = loss(mine, other, torch.arange(rows, device=next(iter(mine.values())).device))
        return self._times_rows(value if loss.whole_batch else value.mean(), rows, count)

    @staticmethod
    def _times_rows(mean: Tensor, rows: int, count: int) -> tuple[Tensor, TermSums]:
        return rows * mean, TermSums(count * mean.detach(), count)
