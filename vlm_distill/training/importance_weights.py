"""Weights of drawn tokens that correct for the student having changed since it drew them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.batch import DistillationBatch
from vlm_distill.config.on_policy_sections import ImportanceSection
from vlm_distill.losses.sequences import token_log_probs
from vlm_distill.models.lm_head import LMHead
from vlm_distill.runtime.processes import Processes


class ImportanceWeights:
    """Computes truncated importance weights, and adds up what a step's metrics say of them.

    With q the student and q₀ the weights that drew the answer y, the weight of its token t is w_t = min(r_t, clip) with
    r_t = q(y_t | y_<t) / q₀(y_t | y_<t) (Ionides 2008, "Truncated importance sampling", J. Comput. Graph. Stat. 17; for
    each action as here: Espeholt et al. 2018, arXiv 1802.01561). With ``over: answer`` it is min(r_1 ⋯ r_t, clip), the
    ratio of the whole answer up to the token. Probabilities are those at temperature 1, over the whole vocabulary; the
    weights are constants in the gradient.

    Args:
        section: of the configuration.
        processes: the ranks.
    """

    def __init__(self, section: ImportanceSection, processes: Processes) -> None:
        self.limit, self.over, self.processes = math.log(section.clip), section.over, processes
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def of(self, batch: DistillationBatch, hidden: Tensor, head: LMHead) -> Tensor:
        """Return the weights of a micro-batch's tokens, float64 ``[N]``, and note them for the step's metrics.

        Args:
            batch: with ``drawn_logprobs``.
            hidden: ``[N, H]``, the student's.
            head: the student's.
        """
        assert batch.drawn_logprobs is not None
        everywhere = torch.arange(len(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            now = token_log_probs(head.uncut(), hidden, batch.targets, everywhere, hidden.dtype)
        ratios = now.double() - batch.drawn_logprobs.double()
        if self.over == "answer":
            ratios = _along_answers(ratios, batch.sample_of)
        weights = ratios.clamp(max=self.limit).exp()
        clipped = (ratios > self.limit).sum()
        self._sums.append(torch.stack([weights.sum(), clipped.double(), weights.new_tensor(len(weights))]))
        return weights

    def metrics(self) -> dict[str, float]:
        """Return the step's metrics, and begin the next step; collective."""
        sums = torch.stack(self._sums).sum(0).tolist() if self._sums else [0.0, 0.0, 0.0]
        self._sums = []
        weights, clipped, count = self.processes.sum(sums)
        return {"on_policy/importance": weights / count, "on_policy/clipped": clipped / count} if count else {}


def _along_answers(ratios: Tensor, sample_of: Tensor) -> Tensor:
    """Return the sum of each answer's log-ratios up to each of its tokens, ``[N]``.

    Example: 1, 2 and 3 in answers 0, 0 and 1 give 1, 3 and 3.
    """
    totals = ratios.cumsum(0)
    first = torch.searchsorted(sample_of, sample_of)
    return totals - totals[first] + ratios[first]
