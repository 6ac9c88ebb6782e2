"""DistillationTask: a student and its losses, which is what an engine steps. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from data.batch import DistillationBatch
from data.errors import UserError
from vlm_distill.losses import FeatureTerm, Term, TermSums, fused_linear, wanted_features
from vlm_distill.models.decoder_features import VISION_FEATURES
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.shared_vision import with_vision_features
from vlm_distill.models.teacher import TeacherOutputs


class DistillationTask(nn.Module):
    """A student and a weighted sum of losses.

    Args:
        student: trained in the parts that it has set trainable.
        terms: the losses, by unique names; those on features are prepared.
        recompute_logits: form the logits in tiles, twice, to save memory; see ``fused_linear``.
        sequence: the ranks that share this one's samples, each of which learns from its share of the positions.
        shared_vision: the teacher sees as the student does, and gives what it saw, ``vision_features``.
    """

    def __init__(
        self,
        student: VisionLanguageModel,
        terms: Sequence[Term | FeatureTerm],
        *,
        recompute_logits: bool = False,
        sequence: SequenceParallel | None = None,
        shared_vision: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.sequence = sequence
        self.recompute_logits = recompute_logits
        self.shared_vision = shared_vision
        self.terms = [term for term in terms if isinstance(term, Term)]
        self.feature_terms = [term for term in terms if isinstance(term, FeatureTerm)]
        self.features = wanted_features(terms)[0]
        # Registered for their parameters and for their state in a checkpoint.
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})

    def read_parameters(self) -> list[nn.Parameter]:
        """Parameters that ``forward`` reads without calling their module."""
        return self.student.head.parameters if self.terms else []

    def forward(
        self, batch: DistillationBatch, teacher: TeacherOutputs | None, scales: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, TermSums]]:
        """The loss of a micro-batch and its terms.

        Args:
            batch: on this rank's device.
            teacher: what the teacher gives for this batch, if there is one.
            scales: a factor for each term's sum over rows, by name; 1 where none is given.

        Returns:
            The differentiable weighted sum (0-d), and the detached sums of each term.
        """
        scales = scales or {}
        inputs = batch.student.inputs
        if self.shared_vision and teacher is not None:
            inputs = with_vision_features(batch, teacher.features[VISION_FEATURES])
        inputs = inputs.to(batch.targets.device, self.student.dtype)
        outputs = self.student(inputs, batch.student.positions, self.features)
        losses: list[Tensor] = []
        sums: dict[str, TermSums] = {}
        # Nothing is known to be right of answers that the student has drawn.
        terms = [term for term in self.terms if not (batch.drawn and "targets" in term.loss.needs)]
        sums |= {term.name: TermSums(outputs.hidden.new_zeros(())) for term in self.terms if term not in terms}
        if terms:
            own = slice(None) if self.sequence is None else self.sequence.share(len(batch.targets))
            found = fused_linear(
                terms,
                outputs.hidden[own],
                self.student.head,
                None if teacher is None else teacher.targets[own],
                batch.targets[own],
                distilled=batch.distilled[own],
                groups=batch.groups,
                scales=scales,
                recompute=self.recompute_logits,
            )
            losses.append(found.loss)
            sums |= found.terms
        for term in self.feature_terms:
            assert teacher is not None
            rows = self._compare(term, batch, outputs.features, teacher.features)
            losses.append(term.weight * scales.get(term.name, 1.0) * rows.sum())
            sums[term.name] = TermSums(rows.detach().sum(), len(rows))
        # A plain tuple with the tensor in it: ZeRO-3 hangs its backward hooks on the tensors it finds in an output.
        return torch.stack(losses).sum(), sums

    def _compare(
        self,
        term: FeatureTerm,
        batch: DistillationBatch,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
    ) -> Tensor:
        """A loss's value for each of its tokens or images, ``[n]``; it hangs in the graph where n is 0, too."""
        loss = term.loss
        samples = batch.sample_of
        if loss.unit == "image":
            assert batch.teacher is not None
            sides = [
                {name: _images(term.name, role, features[name], rows.images) for name in names}
                for role, features, names, rows in (
                    ("student", student, loss.student_features, batch.student),
                    ("teacher", teacher, loss.teacher_features, batch.teacher),
                )
            ]
        else:
            samples = samples[batch.distilled]
            sides = [
                {name: features[name][batch.distilled] for name in names}
                for features, names in ((student, loss.student_features), (teacher, loss.teacher_features))
            ]
        with torch.autocast(batch.targets.device.type, enabled=False):
            return loss(*sides, samples)


def _images(name: str, role: str, features: Tensor, images: Tensor) -> Tensor:
    """The features of the samples' images, in the samples' order."""
    count = len(images)
    if count and len(features) != count:
        raise UserError(
            f"loss {name}: the {role} cuts {count} image(s) into {len(features)} tiles; it compares whole images alone"
        )
    return features[images]
