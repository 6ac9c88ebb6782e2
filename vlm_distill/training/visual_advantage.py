"""Weights of drawn answers by how much the teacher's probabilities of them rest on their images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from data.batch import DistillationBatch
from data.collate import collate
from data.encoding import Pair
from data.errors import UserError
from data.teacher_view import Seen, View
from vlm_distill.config.on_policy_sections import VisualAdvantageSection
from vlm_distill.losses import HiddenTargets
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.processor import Processor
from vlm_distill.models.teacher import Teacher
from vlm_distill.runtime.processes import Processes

from .open_data import view_of


class VisualAdvantage:
    """Computes a weight for each drawn answer of a step.

    A token's visual advantage is log p(token | images) − log p(token | degraded images) under the teacher, an answer's
    is the mean over its tokens (VA-OPD, Liu et al. 2026, arXiv 2605.21924). The weights are n · softmax(advantage /
    temperature) over the step's n answers on all ranks, 1 on average; the softmax is this suite's choice.

    Args:
        section: of the configuration.
        teacher: runs here.
        processes: the ranks.

    Attributes:
        total: the sum of this rank's advantages in the last step.

    Raises:
        UserError: the teacher sees no images.
    """

    def __init__(self, section: VisualAdvantageSection, teacher: Teacher, processes: Processes) -> None:
        assert isinstance(teacher.processor, Processor)
        if not teacher.processor.has_vision:
            raise UserError("on_policy.visual_advantage: the teacher sees no images; leave it out")
        self.view: View = view_of(images=section.images)
        self.temperature, self.teacher, self.processes = section.temperature, teacher, processes
        self.processor = teacher.processor
        self.total = 0.0

    def without_images(self, question: Seen, pair: Pair) -> Pair:
        """Return the same answer as the teacher receives it after degraded images, in the student's place."""
        ids = pair.student.input_ids[pair.student_tokens].tolist()
        encoded = self.processor.answered(self.processor.encode(*self.view.of(*question), generation=True), ids)
        tokens = encoded.supervised.nonzero().flatten()
        return Pair(encoded, None, tokens, tokens, torch.ones(len(tokens), dtype=torch.bool))

    @torch.no_grad()
    def weights(self, batches: Sequence[DistillationBatch], degraded: Sequence[Sequence[Pair]]) -> list[Tensor]:
        """Return the weights of the answers of each micro-batch, float64 ``[samples]``. Collective.

        Args:
            batches: this rank's micro-batches.
            degraded: the pairs of each after degraded images, from :meth:`without_images`.
        """
        mine: list[list[float]] = []
        for batch, pairs in zip(batches, degraded, strict=True):
            worse = collate(pairs, self.processor, None)
            gain = self._log_probs(batch) - self._log_probs(worse)
            sums = gain.new_zeros(len(pairs)).index_add(0, batch.sample_of.to(gain.device), gain)
            counts = batch.sample_of.bincount(minlength=len(pairs)).to(sums)
            mine.append((sums / counts).tolist())

        # Normalise over the answers of all ranks.
        self.total = sum(map(sum, mine))
        everywhere = chain.from_iterable(chain.from_iterable(self.processes.gather(mine)))
        scaled = [advantage / self.temperature for advantage in everywhere]
        if not scaled:
            return [torch.ones(0, dtype=torch.float64) for _ in mine]
        most = max(scaled)
        mean = sum(math.exp(value - most) for value in scaled) / len(scaled)
        return [(torch.tensor(part, dtype=torch.float64) / self.temperature - most).exp() / mean for part in mine]

    def _log_probs(self, batch: DistillationBatch) -> Tensor:
        """Return the teacher's log-probabilities of the answers' tokens, float32 ``[N]``."""
        batch = batch.to(self.processes.device)
        if batch.teacher is None:
            batch.teacher = batch.student
        targets = self.teacher.outputs(batch).targets
        assert isinstance(targets, HiddenTargets)
        assert isinstance(targets.head, LMHead)
        return targets.head.logprobs(targets.hidden, batch.targets)
