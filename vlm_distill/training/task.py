"""DistillationTask: a student and its losses, which is what an engine steps. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from data.batch import DistillationBatch, Rows
from data.errors import UserError
from vlm_distill.losses import FeatureTerm, Term, TermSums, fused_linear, wanted_features
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.teacher import TeacherOutputs


class DistillationTask(nn.Module):
    """A student and a weighted sum of losses.

    Args:
        student: trained in the parts that it has set trainable.
        terms: the losses, by unique names; those on features are prepared.
        recompute_logits: form the logits in tiles, twice, to save memory; see ``fused_linear``.
    """

    def __init__(
        self, student: VisionLanguageModel, terms: Sequence[Term | FeatureTerm], *, recompute_logits: bool = False
    ) -> None:
        super().__init__()
        self.student = student
        self.recompute_logits = recompute_logits
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
        inputs = batch.student.inputs.to(batch.targets.device, self.student.dtype)
        outputs = self.student(inputs, batch.student.positions, self.features)
        losses: list[Tensor] = []
        sums: dict[str, TermSums] = {}
        if self.terms:
            found = fused_linear(
                self.terms,
                outputs.hidden,
                self.student.head,
                None if teacher is None else teacher.targets,
                batch.targets,
                distilled=batch.distilled,
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
        samples = _samples(batch.student)
        if loss.unit == "image":
            sides = [
                {name: _images(term.name, role, features[name], batch.images) for name in names}
                for role, features, names in (
                    ("student", student, loss.student_features),
                    ("teacher", teacher, loss.teacher_features),
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


def _samples(rows: Rows) -> Tensor:
    """The sample of each position, ``[N]``, ascending. The k-th position is the teacher's k-th, so that one side tells.

    Samples are rows, or documents of a row where they are packed: the position 0 begins each.
    """
    places = rows.inputs.get("position_ids")
    if places is None:
        return rows.positions // rows.inputs["input_ids"].shape[1]
    return (places == 0).flatten().cumsum(0)[rows.positions]


def _images(name: str, role: str, features: Tensor, images: int) -> Tensor:
    """The real images' features: a dummy row's image comes last."""
    if images and len(features) != images:
        raise UserError(
            f"loss {name}: the {role} cuts {images} image(s) into {len(features)} tiles; it compares whole images alone"
        )
    return features[:images]
