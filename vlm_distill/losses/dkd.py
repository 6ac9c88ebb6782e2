"""Decoupled knowledge distillation: the right token against the rest, and the rest among themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import DistillationLoss, RowResult
from .parameters import check_number
from .softmax import Softmax, kl_divergence, need_targets, relative_entropy_, soften_, softmax_, upcast


class DKD(DistillationLoss):
    """Decoupled KD, T²·(α·KL(b_t‖b_s) + β·KL(r_t‖r_s)) (Zhao et al., 2022).

    b is the pair (probability of the right token, probability of all others) and r the distribution over the others,
    both at temperature T. With β = 1 − b_t this is KD; a fixed β keeps what a confident teacher knows about the others.

    Args:
        alpha: α.
        beta: β.
        temperature: T.
    """

    needs = frozenset({"teacher", "targets"})
    scratch = 2

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.alpha = check_number("loss dkd: alpha", alpha, 0.0)
        self.beta = check_number("loss dkd: beta", beta, 0.0)
        self.temperature = check_number("loss dkd: temperature", temperature, 0.0, above=True)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        index = need_targets(targets).unsqueeze(-1)
        student, teacher = upcast(student_logits) / self.temperature, upcast(teacher_logits) / self.temperature
        log_s, rest_s = self._log_split(student, index)
        log_t, rest_t = self._log_split(teacher, index)
        loss = self.alpha * kl_divergence(log_t, log_s) + self.beta * kl_divergence(rest_t, rest_s)
        return self.temperature**2 * loss

    def _log_split(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return log b ``[N, 2]`` and log r ``[N, V]``, −∞ at the right token."""
        rest = logits.scatter(-1, index, -torch.inf)
        both = torch.cat([logits.gather(-1, index), rest.logsumexp(-1, keepdim=True)], dim=-1)
        return both.log_softmax(-1), rest.log_softmax(-1)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        index = need_targets(targets).unsqueeze(-1)
        student, teacher = soften_(student_logits, teacher_logits, self.temperature)
        log_s, s = self._softmax_split(student, index)
        log_t, t = self._softmax_split(teacher, index)
        loss = self.alpha * kl_divergence(log_t, log_s)
        others, _ = relative_entropy_(t, s)
        loss = self.temperature**2 * (loss + self.beta * others)
        if not grad:
            return RowResult(loss)
        # α (b_s − b_t)·(e_y − r_s) + β (r_s − r_t), b of the right token y, times T
        right = self.alpha * (log_s.exp() - log_t.exp())[:, :1]
        gradient = t.probs.mul_(-self.beta).addcmul_(s.probs, self.beta - right)
        gradient.scatter_(-1, index, right)
        return RowResult(loss, gradient.mul_(self.temperature))

    def _softmax_split(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Softmax]:
        """Return log b and r as a softmax, in the logits' memory."""
        own = logits.gather(-1, index)
        logits.scatter_(-1, index, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        rest = softmax_(logits)
        return torch.cat([own, top + rest.log_total], dim=-1).log_softmax(-1), rest
