"""DistillationTask: the module that the engine trains, a student with its losses. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from data.batch import DistillationBatch
from data.errors import UserError
from vlm_distill.losses import (
    IMAGE_HIDDEN,
    FeatureTerm,
    HiddenTargets,
    LossSums,
    Term,
    TermSums,
    TokenGroups,
    adapt_terms,
    fused_linear,
    sequence_weights,
    wanted_features,
)
from vlm_distill.models.decoder_features import VISION_FEATURES
from vlm_distill.models.image_hidden import run_at_positions
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.shared_vision import with_vision_features
from vlm_distill.models.teacher import TeacherOutputs

from .terms import acts_on


class DistillationTask(nn.Module):
    """A student and a weighted sum of losses.

    Args:
        student: the student, with its trained parts marked.
        terms: the losses under unique names, prepared.
        recompute_logits: compute the logits twice, in tiles, to save memory; see ``fused_linear``.
        sequence: the ranks that share this one's samples; each computes the losses of its share of the positions.
        shared_vision: take the vision encoder's output from the teacher (its feature ``vision_features``), for both.
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
        # Registered so that their parameters are trained and their state is saved.
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})

    def read_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that ``forward`` reads without calling their module."""
        return self.student.head.parameters if self.terms else []

    def forward(
        self, batch: DistillationBatch, teacher: TeacherOutputs | None, scales: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, TermSums]]:
        """Compute the loss of a micro-batch and its terms.

        Args:
            batch: on this rank's device.
            teacher: the teacher's outputs for this batch, if there is a teacher.
            scales: factors on the terms' sums, by name; the default is 1.

        Returns:
            The differentiable weighted sum (0-d), and the detached sums of each term.
        """
        scales = scales or {}

        # The student's forward.
        inputs = batch.student.inputs
        if self.shared_vision and teacher is not None:
            inputs = with_vision_features(batch, teacher.features[VISION_FEATURES])
        inputs = inputs.to(batch.targets.device, self.student.dtype)
        outputs = run_at_positions(self.student, inputs, batch.student, self.features)
        losses: list[Tensor] = []
        sums: dict[str, TermSums] = {}

        # Losses on logits that act on these answers.
        terms = [term for term in self.terms if acts_on(term, drawn=batch.drawn)]
        sums |= {name: TermSums(outputs.hidden.new_zeros(())) for name in self.losses}
        at_text = [term for term in terms if term.on == "text"]
        at_images = [term for term in terms if term.on == "images"]
        found: list[LossSums] = []
        if at_text:
            found.append(self._compare_text(at_text, batch, outputs.hidden, teacher, scales))
        if at_images:
            assert teacher is not None
            samples, hidden = batch.student.image_samples, outputs.features[IMAGE_HIDDEN]
            found.append(self._compare_images(at_images, samples, hidden, teacher, scales))
        for part in found:
            losses.append(part.loss)
            sums |= part.terms

        # Losses on features.
        for term in self.feature_terms:
            if not acts_on(term, drawn=batch.drawn):
                continue
            assert teacher is not None
            values = self._compare(term, batch, outputs.features, teacher.features)
            losses.append(term.weight * scales.get(term.name, 1.0) * values.sum())
            sums[term.name] = TermSums(values.detach().sum(), len(values))
        # The tensor must be in a plain tuple: ZeRO-3 attaches its backward hooks to the tensors that it finds there.
        return torch.stack(losses).sum(), sums

    def _compare_text(
        self,
        terms: Sequence[Term],
        batch: DistillationBatch,
        hidden: Tensor,
        teacher: TeacherOutputs | None,
        scales: Mapping[str, float],
    ) -> LossSums:
        """Return the losses on logits at the supervised tokens; ``hidden`` is the student's ``[N, H]``."""
        # Treat each answer as a whole where a term asks for that.
        if any(term.loss.adapts for term in terms):
            assert teacher is not None
            assert isinstance(teacher.targets, HiddenTargets)
            rows = batch.targets, batch.sample_of, batch.distilled
            terms = adapt_terms(terms, hidden, self.student.head, teacher.targets, *rows)
        own = slice(None) if self.sequence is None else self.sequence.share(len(batch.targets))
        compared = batch.distilled if batch.groups is None else batch.groups
        terms = _weighted(terms, batch.sample_of, compared, own)

        return fused_linear(
            terms,
            hidden[own],
            self.student.head,
            None if teacher is None else teacher.targets[own],
            batch.targets[own],
            distilled=batch.distilled[own] if batch.groups is None else batch.groups,
            scales=scales,
            recompute=self.recompute_logits,
        )

    def _compare_images(
        self,
        terms: Sequence[Term],
        samples: Tensor,
        hidden: Tensor,
        teacher: TeacherOutputs,
        scales: Mapping[str, float],
    ) -> LossSums:
        """Return the losses on logits at the image tokens.

        ``hidden`` is the student's ``[T, H]``, and ``samples [T]`` the number of the sample of each image token.
        """
        assert isinstance(teacher.targets, HiddenTargets)
        targets = HiddenTargets(teacher.features[IMAGE_HIDDEN], teacher.targets.head)
        own = slice(None) if self.sequence is None else self.sequence.share(len(hidden))
        terms = _weighted(terms, samples, None, own)
        return fused_linear(
            terms, hidden[own], self.student.head, targets[own], scales=scales, recompute=self.recompute_logits
        )

    def _compare(
        self,
        term: FeatureTerm,
        batch: DistillationBatch,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
    ) -> Tensor:
        """Return a loss's value for each of its units, ``[n]``, attached to the graph even if n is 0."""
        loss, samples = term.loss, batch.sample_of
        if loss.unit == "image":
            assert batch.teacher is not None
            images = batch.student.images, batch.teacher.images
            mine = {n: _images(term.name, "student", student[n], images[0]) for n in loss.student_features}
            theirs = {n: _images(term.name, "teacher", teacher[n], images[1]) for n in loss.teacher_features}
        elif loss.unit == "sample":
            samples = batch.student.image_samples
            mine = {name: student[name] for name in loss.student_features}
            theirs = {name: teacher[name] for name in loss.teacher_features}
        else:
            samples = samples[batch.distilled]
            mine = {name: student[name][batch.distilled] for name in loss.student_features}
            theirs = {name: teacher[name][batch.distilled] for name in loss.teacher_features}
        with torch.autocast(batch.targets.device.type, enabled=False):
            return loss(mine, theirs, samples)


def _weighted(terms: Sequence[Term], samples: Tensor, compared: Tensor | TokenGroups | None, own: slice) -> list[Term]:
    """Return the terms, with weights of positions for those that average over sequences.

    Args:
        terms: of the loss.
        samples: int64 ``[N]``, the number of the sample of each position.
        compared: the positions that terms with a teacher see.
        own: this rank's share of the positions.
    """
    found = []
    for compares in (False, True):
        chosen = [term for term in terms if term.has_teacher == compares]
        if any(term.mean == "sequences" for term in chosen):
            weights = sequence_weights(samples, compared if compares else None)[own]
            chosen = [replace(term, row_weights=weights) if term.mean == "sequences" else term for term in chosen]
        found += chosen
    return found


def _images(name: str, role: str, features: Tensor, images: Tensor) -> Tensor:
    """Return the features of the samples' images, in the order of the samples."""
    count = len(images)
    if count and len(features) != count:
        raise UserError(
            f"loss {name}: the {role} cuts {count} image(s) into {len(features)} tiles; it compares only whole images"
        )
    return features[images]
