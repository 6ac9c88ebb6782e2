"""DistillationTask: the module that the engine trains, a student with its losses. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
    Match,
    Term,
    TermSums,
    TokenGroups,
    adapt_terms,
    fused_linear,
    matches_tokens,
    sequence_weights,
    wanted_features,
)
from vlm_distill.losses.from_hidden import Targets
from vlm_distill.models.decoder_features import VISION_FEATURES
from vlm_distill.models.image_hidden import run_at_positions
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.models.shared_vision import with_vision_features
from vlm_distill.models.teacher import TeacherOutputs

from .image_matching import ImageMatching
from .importance_weights import ImportanceWeights
from .terms import acts_on


def comparison_key(teachers: Sequence[str], term: str) -> str:
    """Return the name under which the sums of a term's comparison with some of several teachers are kept."""
    return f"teacher/{'+'.join(teachers)}/{term}"


class DistillationTask(nn.Module):
    """A student and a weighted sum of losses.

    Args:
        student: the student, with its trained parts marked.
        terms: the losses under unique names, prepared.
        recompute_logits: compute the logits twice, in tiles, to save memory; see ``fused_linear``.
        sequence: the ranks that share this one's samples; each computes the losses of its share of the positions.
        shared_vision: take the vision encoder's output from the teacher (its feature ``vision_features``), for both.
        importance: weighs the tokens of answers whose drawn probabilities are known.
    """

    def __init__(
        self,
        student: VisionLanguageModel,
        terms: Sequence[Term | FeatureTerm],
        *,
        recompute_logits: bool = False,
        sequence: SequenceParallel | None = None,
        shared_vision: bool = False,
        importance: ImportanceWeights | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.sequence = sequence
        self.recompute_logits = recompute_logits
        self.shared_vision = shared_vision
        self.importance = importance
        self.terms = [term for term in terms if isinstance(term, Term)]
        self.feature_terms = [term for term in terms if isinstance(term, FeatureTerm)]
        self.features = wanted_features(terms)[0]
        # Registered so that their parameters are trained and their state is saved.
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms})

    def read_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that ``forward`` reads without calling their module."""
        pairs_logits = any(term.match == "hungarian" for term in self.feature_terms)
        return self.student.head.parameters if self.terms or pairs_logits else []

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
        importance = None
        if at_text and self.importance is not None and batch.drawn_logprobs is not None:
            importance = self.importance.of(batch, outputs.hidden, self.student.head)
        if at_text and batch.comparisons:
            assert teacher is not None
            found += self._compare_several(at_text, batch, outputs.hidden, teacher, scales, importance, sums)
        elif at_text:
            found.append(self._compare_text(at_text, batch, outputs.hidden, teacher, scales, importance))
        matching = self._matching(batch, outputs.features, teacher)
        # Terms that pair image tokens alike share their logits.
        for match in dict.fromkeys(term.match for term in at_images):
            assert matching is not None
            together = [term for term in at_images if term.match == match]
            found.append(self._compare_images(together, matching, match, scales))
        for part in found:
            losses.append(part.loss)
            for name, more in part.terms.items():
                sums[name] = sums[name].plus(more) if name in sums else more

        # Losses on features.
        for term in self.feature_terms:
            if not acts_on(term, drawn=batch.drawn):
                continue
            assert teacher is not None
            values = self._compare(term, batch, outputs.features, teacher.features, matching)
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
        importance: Tensor | None,
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
        terms = _weighted(terms, batch.sample_of, compared, own, batch.answer_weights)
        targets = None if teacher is None or teacher.targets is None else teacher.targets[own]
        compared = batch.distilled[own] if batch.groups is None else batch.groups
        return self._sum_up(terms, hidden[own], targets, batch.targets[own], compared, scales, importance)

    def _sum_up(
        self,
        terms: Sequence[Term],
        hidden: Tensor,
        teacher: Targets | None,
        targets: Tensor,
        compared: Tensor | TokenGroups,
        scales: Mapping[str, float],
        importance: Tensor | None,
    ) -> LossSums:
        """Return the losses on logits at some positions, times importance weights; these do not change counts."""
        weighted = terms if importance is None else _times(terms, importance)
        rows = hidden, self.student.head, teacher, targets
        found = fused_linear(weighted, *rows, distilled=compared, scales=scales, recompute=self.recompute_logits)
        if importance is not None:
            assert isinstance(compared, Tensor)
            for term in terms:
                positions = compared if term.has_teacher else torch.ones_like(compared)
                weights = positions.double() if term.row_weights is None else term.row_weights[positions]
                found.terms[term.name].count = weights.sum()
        return found

    def _compare_several(
        self,
        terms: Sequence[Term],
        batch: DistillationBatch,
        hidden: Tensor,
        teacher: TeacherOutputs,
        scales: Mapping[str, float],
        importance: Tensor | None,
        sums: dict[str, TermSums],
    ) -> list[LossSums]:
        """Return the losses at the supervised tokens, compared with several teachers.

        Adds the sums of each comparison to ``sums``, under ``teacher/NAME/TERM``.
        """
        # If every position has one teacher, losses without a teacher read the same logits.
        once = all(comparison.weight == 1 for comparison in batch.comparisons)
        found: list[LossSums] = []
        with ExitStack() as opened:
            for head in teacher.sharded:
                opened.enter_context(head.weight())
            for comparison in batch.comparisons:
                own = [term for term in terms if once or term.has_teacher]
                rows = comparison.rows
                compared = comparison.distilled if comparison.groups is None else comparison.groups
                part = self._sum_up(
                    _weighted(own, batch.sample_of[rows], compared),
                    hidden[rows],
                    teacher.compared_in(comparison),
                    batch.targets[rows],
                    compared,
                    {term.name: comparison.weight * scales.get(term.name, 1.0) for term in own},
                    None if importance is None else importance[rows],
                )
                weighted = {name: more.times(comparison.weight) for name, more in part.terms.items()}
                found.append(LossSums(part.loss, weighted))
                for term in own:
                    if term.has_teacher:
                        key = comparison_key(comparison.teachers, term.name)
                        sums[key] = sums[key].plus(weighted[term.name]) if key in sums else weighted[term.name]
        others = [term for term in terms if not (once or term.has_teacher)]
        if others:
            found.append(self._compare_text(others, batch, hidden, None, scales, importance))
        return found

    def _matching(
        self, batch: DistillationBatch, features: Mapping[str, Tensor], teacher: TeacherOutputs | None
    ) -> ImageMatching | None:
        """Return what pairs the models' image tokens; ``None`` if no loss reads logits or hidden states there."""
        if IMAGE_HIDDEN not in features:
            return None
        assert teacher is not None
        assert isinstance(teacher.targets, HiddenTargets)
        theirs = HiddenTargets(teacher.features[IMAGE_HIDDEN], teacher.targets.head)
        return ImageMatching(batch, features[IMAGE_HIDDEN], self.student.head, theirs)

    def _compare_images(
        self, terms: Sequence[Term], matching: ImageMatching, match: Match, scales: Mapping[str, float]
    ) -> LossSums:
        """Return the losses on logits at the image tokens, paired in one way."""
        hidden, targets = matching.hidden_states(match)
        own = slice(None) if self.sequence is None else self.sequence.share(len(hidden))
        terms = _weighted(terms, matching.samples(match), None, own)
        return fused_linear(
            terms, hidden[own], self.student.head, targets[own], scales=scales, recompute=self.recompute_logits
        )

    def _compare(
        self,
        term: FeatureTerm,
        batch: DistillationBatch,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        matching: ImageMatching | None,
    ) -> Tensor:
        """Return a loss's value for each of its units, ``[n]``, attached to the graph even if n is 0."""
        loss, samples = term.loss, batch.sample_of
        mine = {name: student[name] for name in loss.student_features}
        theirs = {name: teacher[name] for name in loss.teacher_features}
        if loss.unit == "image":
            assert batch.teacher is not None
            mine = {n: _images(term.name, "student", x, batch.student.images) for n, x in mine.items()}
            theirs = {n: _images(term.name, "teacher", x, batch.teacher.images) for n, x in theirs.items()}
            if matches_tokens(term):
                assert matching is not None
                mine = {n: matching.by_image(term.name, "student", x) for n, x in mine.items()}
                theirs = {n: matching.by_image(term.name, "teacher", x) for n, x in theirs.items()}
        elif loss.unit == "sample":
            samples = batch.student.image_samples
            if matches_tokens(term):
                assert matching is not None
                samples = matching.samples(term.match)
                mine |= {IMAGE_HIDDEN: matching.student(term.match, mine[IMAGE_HIDDEN])}
                theirs |= {IMAGE_HIDDEN: matching.teacher(term.match, theirs[IMAGE_HIDDEN])}
        else:
            samples = samples[batch.distilled]
            mine = {name: x[batch.distilled] for name, x in mine.items()}
            theirs = {name: x[batch.distilled] for name, x in theirs.items()}
        with torch.autocast(batch.targets.device.type, enabled=False):
            return loss(mine, theirs, samples)


def _weighted(
    terms: Sequence[Term],
    samples: Tensor,
    compared: Tensor | TokenGroups | None,
    own: slice = slice(None),
    answers: Tensor | None = None,
) -> list[Term]:
    """Return the terms, with weights of positions for those that average over sequences, or if answers have weights.

    Args:
        terms: of the loss.
        samples: int64 ``[N]``, the number of the sample of each position.
        compared: the positions that terms with a teacher see.
        own: this rank's share of the positions.
        answers: a weight for each sample.
    """
    found = []
    for compares in (False, True):
        chosen = [term for term in terms if term.has_teacher == compares]
        weights: dict[str, Tensor | None] = {"tokens": None if answers is None else answers[samples][own]}
        if any(term.mean == "sequences" for term in chosen):
            means = sequence_weights(samples, compared if compares else None)
            weights["sequences"] = (means if answers is None else means * answers[samples])[own]
        found += [replace(term, row_weights=weights[term.mean]) for term in chosen]
    return found


def _times(terms: Sequence[Term], importance: Tensor) -> list[Term]:
    """Return the terms with the weights of their positions multiplied; terms that share weights still do."""
    products: dict[int, Tensor] = {}
    for term in terms:
        if id(term.row_weights) not in products:
            weights = importance if term.row_weights is None else term.row_weights * importance
            products[id(term.row_weights)] = weights
    return [replace(term, row_weights=products[id(term.row_weights)]) for term in terms]


def _images(name: str, role: str, features: Tensor, images: Tensor) -> Tensor:
    """Return the features of the samples' images, in the order of the samples."""
    count = len(images)
    if count and len(features) != count:
        raise UserError(
            f"loss {name}: the {role} cuts {count} image(s) into {len(features)} tiles; it compares only whole images"
        )
    return features[images]
