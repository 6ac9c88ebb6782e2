"""ClassificationTask: a classifier and its losses, which is what an engine steps. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm_distill.losses import BatchLoss, FeatureLoss, FeatureTerm, Term, TermSums, on_logits, wanted_features

from .classifier import Classifier, Outputs
from .transforms import Views


@dataclass(frozen=True)
class BatchTerm:
    """One summand of the training loss that compares the rows of a batch with one another."""

    name: str
    loss: BatchLoss
    weight: float = 1.0


AnyTerm = Term | BatchTerm | FeatureTerm


class ClassificationTask(nn.Module):
    """A student and a weighted sum of losses.

    Losses with one value for each row see every view of every image. Where the student has a distillation head (DeiT),
    losses that need a teacher see that head's logits, and the others those of its class head.

    Args:
        student: trained in the parameters that require gradients.
        terms: the losses, by unique names, prepared.
        views: of each image.
        gather: joins the rows ``[n, …]`` of all ranks, differentiable in this rank's own; ``None`` where losses of a
            batch see this rank's alone.
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
        # Registered for their parameters and for their state in a checkpoint.
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})

    def read_parameters(self) -> list[nn.Parameter]:
        """Parameters that ``forward`` reads without calling their module: with features, timm's own methods do."""
        return list(self.student.model.parameters(recurse=False)) if self.features else []

    def forward(
        self, views: Views, teacher: Outputs | None, scales: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, TermSums]]:
        """The loss of a micro-batch and its terms.

        Args:
            views: V views of N images on this rank's device.
            teacher: what the teacher gives for them, its classes in the student's order.
            scales: a factor for each term's sum over rows, by name; 1 where none is given.

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
                    loss, found = self._batch(term.loss, outputs, teacher, views.labels)
                else:
                    loss, found = self._compare(term.loss, outputs.features, teacher.features)
            losses.append(term.weight * scales.get(term.name, 1.0) * loss)
            sums[term.name] = found
        # A plain tuple with the tensor in it: ZeRO-3 hangs its backward hooks on the tensors it finds in an output.
        return torch.stack(losses).sum(), sums

    def _rows(
        self, outputs: Outputs, teacher: Outputs | None, views: Views, scales: Mapping[str, float]
    ) -> tuple[list[Tensor], dict[str, TermSums]]:
        """Terms with a value for each row, those together that see the same logits and targets."""
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

    def _batch(self, loss: BatchLoss, outputs: Outputs, teacher: Outputs, labels: Tensor) -> tuple[Tensor, TermSums]:
        """A loss of a batch times the rows that it is a mean over, so that it adds up as sums over rows do."""
        mine = outputs.logits if outputs.distilled is None else outputs.distilled
        count = len(labels) * (self.views if loss.views == 1 else 1)
        if self.gather is None:
            rows, sides, targets = count, [mine, teacher.logits], labels
        else:
            # View by view: a batch of all ranks has the first views of all images first, too.
            chunks = [[self.gather(part) for part in side.chunk(self.views)] for side in (mine, teacher.logits)]
            sides, targets = [torch.cat(parts) for parts in chunks], self.gather(labels)
            rows = len(targets) * (self.views if loss.views == 1 else 1)
        if not rows:
            return 0.0 * mine.sum(), TermSums(mine.new_zeros(()))
        value = loss(sides[0], sides[1], targets if loss.views > 1 else targets.repeat(self.views))
        return rows * value, TermSums(count * value.detach(), count)

    def _compare(
        self, loss: FeatureLoss, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
    ) -> tuple[Tensor, TermSums]:
        mine = {name: student[name] for name in loss.student_features}
        other = {name: teacher[name] for name in loss.teacher_features}
        first = next(iter(mine.values()))
        count = rows = len(first)
        samples = torch.arange(rows, device=first.device)
        if not loss.whole_batch:
            if not count:
                return 0.0 * first.float().sum(), TermSums(first.new_zeros((), dtype=torch.float32))
            values = loss(mine, other, samples)
            return values.sum(), TermSums(values.detach().sum(), count)
        if self.gather is not None:
            mine, other = ({k: self.gather(v) for k, v in side.items()} for side in (mine, other))
            rows = len(next(iter(mine.values())))
        if not rows:
            return 0.0 * first.float().sum(), TermSums(first.new_zeros((), dtype=torch.float32))
        value = loss(mine, other, torch.arange(rows, device=first.device))
        return rows * value, TermSums(count * value.detach(), count)
