"""DistillationTask: a student and its losses, which is what an engine steps. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from data.batch import DistillationBatch
from vlm_distill.losses import HiddenTargets, Term, TermSums, fused_linear
from vlm_distill.models.interface import VisionLanguageModel


class DistillationTask(nn.Module):
    """A student and a weighted sum of losses.

    Args:
        student: trained in the parts that it has set trainable.
        terms: the losses, by unique names.
        recompute_logits: form the logits in tiles, twice, to save memory; see ``fused_linear``.
    """

    def __init__(self, student: VisionLanguageModel, terms: Sequence[Term], *, recompute_logits: bool = False) -> None:
        super().__init__()
        self.student = student
        self.recompute_logits = recompute_logits
        self.terms = list(terms)
        # Registered for their parameters and for their state in a checkpoint.
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})

    def forward(
        self, batch: DistillationBatch, teacher: HiddenTargets | None, scales: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, TermSums]]:
        """The loss of a micro-batch and its terms.

        Args:
            batch: on this rank's device.
            teacher: the teacher's hidden states for this batch, if there is one.
            scales: a factor for each term's sum over rows, by name; 1 where none is given.

        Returns:
            The differentiable weighted sum (0-d), and the detached sums of each term.
        """
        inputs = batch.student.inputs.to(batch.targets.device, self.student.dtype)
        hidden = self.student(inputs, batch.student.positions).hidden
        sums = fused_linear(
            self.terms,
            hidden,
            self.student.head,
            teacher,
            batch.targets,
            distilled=batch.distilled,
            scales=scales,
            recompute=self.recompute_logits,
        )
        # A plain tuple with the tensor in it: ZeRO-3 hangs its backward hooks on the tensors it finds in an output.
        return sums.loss, sums.terms
