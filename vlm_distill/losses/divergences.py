"""Divergences between the teacher's distribution p and the student's q, and the cross-entropy with the right tokens.

Each divergence has its definition in ``between`` and the closed form of its gradient in ``between_``. Logits are
divided by the temperature T; only KD has the factor T². A logit of −∞ in both models puts a token outside the
vocabulary: it adds nothing and receives no gradient.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import (
    DistillationLoss,
    RowResult,
    Softmax,
    check_choice,
    check_number,
    need_targets,
    relative_entropy_,
    soften_,
    softmax_,
    through_softmax_,
    upcast,
)
from .kernels import Form, Kind, agree
from .kernels import rows as kernel_rows


def kl_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) over the last dimension, from log-probabilities; differentiable in both.

    Args:
        log_a: ``[N, V]``.
        log_b: ``[N, V]``.

    Returns:
        ``[N]`` nats. Tokens outside the support of a count 0.
    """
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


class Divergence(DistillationLoss):
    """A loss that compares two distributions over the same categories, and nothing else of the logits.

    Args:
        temperature: divides both models' logits.
    """

    label: ClassVar[str]
    kind: ClassVar[Kind | None] = None

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = check_number(f"loss {self.label}: temperature", temperature, 0.0, above=True)
        self.factor = 1.0
        self.share = 0.0
        # The tail's mass at another temperature cannot be known from its mass at 1.
        self.takes_topk = self.temperature == 1.0

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The definition, differentiable in ``log_q``.

        Args:
            log_p: ``[N, V]``, log-probabilities of the teacher, or of any other target.
            log_q: ``[N, V]``, those of the student.

        Returns:
            ``[N]`` nats.
        """
        raise NotImplementedError

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        """The same with its derivative by the logits of ``q`` ``[N, V]``, ``None`` unless asked for.

        The memory of both arguments may be overwritten.
        """
        raise NotImplementedError

    def streamed(self) -> Form | None:
        return None if self.kind is None else Form(self.kind, self.share, self.temperature, self.factor)

    def categories(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.between(log_p, log_q), {}

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = upcast(student_logits) / self.temperature, upcast(teacher_logits) / self.temperature
        return self.factor * self.between(teacher.log_softmax(-1), student.log_softmax(-1))

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        form = self.streamed()
        if form is not None and student_logits.is_cuda:
            loss, gradient, _ = kernel_rows(form, upcast(student_logits), upcast(teacher_logits), grad=grad)
            return RowResult(loss, gradient)
        student, teacher = soften_(student_logits, teacher_logits, self.temperature)
        loss, gradient = self.between_(softmax_(teacher), softmax_(student), grad=grad)
        if self.factor != 1.0:
            loss = loss * self.factor
        if gradient is not None and self.factor != self.temperature:
            gradient.mul_(self.factor / self.temperature)
        return RowResult(loss, gradient)


class ForwardKL(Divergence):
    """Forward KL, KL(p‖q): the student covers all that the teacher may say (Hinton et al., 2015)."""

    label = "forward_kl"
    kind = Kind.FORWARD_KL
    scratch = 2

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_divergence(log_p, log_q)

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        loss, _ = relative_entropy_(p, q)
        return loss, q.probs.sub_(p.probs) if grad else None


class KD(ForwardKL):
    """Knowledge distillation, T²·KL(p‖q) with both softmaxes at temperature T (Hinton et al., 2015).

    T² keeps the size of the gradient when T changes.
    """

    label = "kd"

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__(temperature)
        self.factor = self.temperature**2


class ReverseKL(Divergence):
    """Reverse KL, KL(q‖p): the student keeps to what the teacher says most (Gu et al., 2024).

    Infinite where the student gives mass to a token that the teacher rules out.
    """

    label = "reverse_kl"
    kind = Kind.REVERSE_KL
    scratch = 2

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_divergence(log_q, log_p)

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        loss, summands = relative_entropy_(q, p)
        # d KL(q‖p) / d logits = q·(log q/p − KL)
        return loss, summands.addcmul_(q.probs, loss.unsqueeze(-1), value=-1.0) if grad else None


class JSD(Divergence):
    """Generalised Jensen-Shannon divergence, β KL(p‖m) + (1−β) KL(q‖m), m = β p + (1−β) q (Agarwal et al., 2024).

    ``beta`` weights the teacher; at 0 and at 1 the divergence is 0. ``convention="limit"`` is that of TRL and Liger
    Kernel, which take KL(p‖q) at β = 0 and KL(q‖p) at β = 1, the limits of the divergence divided by β (1−β).
    """

    label = "jsd"
    kind = Kind.JSD
    scratch = 3

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, convention: str = "paper") -> None:
        super().__init__(temperature)
        self.beta = self.share = check_number("loss jsd: beta", beta, 0.0, 1.0)
        self._limit: Divergence | None = None
        if check_choice("loss jsd: convention", convention, ("paper", "limit")) == "limit" and self.beta in (0.0, 1.0):
            self._limit = ForwardKL() if self.beta == 0.0 else ReverseKL()

    def streamed(self) -> Form | None:
        kind = self.kind if self._limit is None else self._limit.kind
        return None if kind is None else Form(kind, self.share, self.temperature)

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self._limit is not None:
            return self._limit.between(log_p, log_q)
        log_m = _log_mixture(log_p, log_q, self.beta)
        return self.beta * kl_divergence(log_p, log_m) + (1.0 - self.beta) * kl_divergence(log_q, log_m)

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        if self._limit is not None:
            return self._limit.between_(p, q, grad=grad)
        log_m = _mixture(p, q, self.beta).log_()
        p_part = _summands_(p, log_m).sum(-1)
        q_summands = _summands_(q, log_m)
        q_part = q_summands.sum(-1)
        loss = self.beta * p_part + (1.0 - self.beta) * q_part
        if not grad:
            return loss, None
        # (1−β) q·(log q/m − KL(q‖m)): the derivatives through m cancel.
        return loss, q_summands.addcmul_(q.probs, q_part.unsqueeze(-1), value=-1.0).mul_(1.0 - self.beta)


class _Skew(Divergence):
    """The second distribution takes a share ``alpha`` of the first."""

    scratch = 4

    def __init__(self, alpha: float = 0.1, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        self.alpha = self.share = check_number(f"loss {self.label}: alpha", alpha, 0.0, 1.0, above=True)


class SkewForwardKL(_Skew):
    """Skew forward KL, KL(p‖α p + (1−α) q) (Ko et al., DistiLLM, 2024); α near 0 is forward KL."""

    label = "skew_forward_kl"
    kind = Kind.SKEW_FORWARD_KL

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_divergence(log_p, _log_mixture(log_p, log_q, self.alpha))

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        mixture = _mixture(p, q, self.alpha)
        loss = _summands_(p, mixture.log()).sum(-1)
        if not grad:
            return loss, None
        # −(1−α) p q/m; the ratio (1−α) q/m is at most 1.
        slope = torch.div(q.probs, mixture, out=mixture).mul_(p.probs).mul_(self.alpha - 1.0)
        return loss, through_softmax_(slope, q.probs)


class SkewReverseKL(_Skew):
    """Skew reverse KL, KL(q‖(1−α) p + α q) (Ko et al., DistiLLM, 2024); finite where the teacher rules a token out."""

    label = "skew_reverse_kl"
    kind = Kind.SKEW_REVERSE_KL

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_divergence(log_q, _log_mixture(log_p, log_q, 1.0 - self.alpha))

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        mixture = _mixture(p, q, 1.0 - self.alpha)
        summands = _summands_(q, mixture.log())
        loss = summands.sum(-1)
        if not grad:
            return loss, None
        # q·(log q/m − α q/m), less q, which the softmax takes out; the ratio α q/m is at most 1.
        ratio = torch.div(q.probs, mixture, out=mixture)
        return loss, through_softmax_(summands.addcmul_(ratio, q.probs, value=-self.alpha), q.probs)


class TVD(Divergence):
    """Total variation distance, ½ Σ|p−q| (Wen et al., 2023): bounded, so that no token dominates the gradient.

    It has no derivative where p = q; 0 is taken there, and where both are equal but for rounding.
    """

    label = "tvd"
    kind = Kind.TVD
    scratch = 5

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p, q = log_p.exp(), log_q.exp()
        return 0.5 * torch.where(agree(p, q), 0.0, q - p).abs().sum(-1)

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        same = agree(p.probs, q.probs)
        gap = torch.sub(q.probs, p.probs, out=p.probs).masked_fill_(same, 0.0)
        loss = 0.5 * gap.abs().sum(-1)
        if not grad:
            return loss, None
        return loss, through_softmax_(gap.sign_().mul_(0.5).mul_(q.probs), q.probs)


class AdaptiveKL(Divergence):
    """Adaptive KL, h·KL(p‖q) + (1−h)·KL(q‖p), h the head's share of Σ|p−q|, taken as constant (Wu et al., 2024).

    The head is what the teacher finds likeliest: in descending order of p, a token is tail if the cumulative mass with
    it exceeds ``mu``; the first is always head. Of equal probabilities the lower index comes first. Where p = q, h = ½.

    ``convention="taid"`` is the baseline of the TAID paper as its code has it, faults included: tokens sorted in
    ascending order, the mask of that order laid on the gaps in the vocabulary's (those from ``mu`` on count), the
    cross-entropy of p and q in place of KL(p‖q), and h differentiated. It takes no top-k teacher.
    """

    label = "adaptive_kl"
    scratch = 8

    def __init__(self, mu: float = 0.5, temperature: float = 1.0, convention: str = "paper") -> None:
        super().__init__(temperature)
        self.mu = check_number("loss adaptive_kl: mu", mu, 0.0, 1.0)
        self._taid = check_choice("loss adaptive_kl: convention", convention, ("paper", "taid")) == "taid"
        self.takes_topk = self.takes_topk and not self._taid

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self._taid:
            return self._as_in_taid(log_p, log_q)
        head = self._head_share(log_p.detach().exp(), log_q.detach().exp())
        return head * kl_divergence(log_p, log_q) + (1.0 - head) * kl_divergence(log_q, log_p)

    def between_(self, p: Softmax, q: Softmax, *, grad: bool) -> tuple[Tensor, Tensor | None]:
        if self._taid:
            with torch.enable_grad():
                leaf = q.log_probs.requires_grad_(grad)
                value = self._as_in_taid(p.log_probs, leaf)
                slope = torch.autograd.grad(value.sum(), leaf)[0] if grad else None
            return value.detach(), None if slope is None else through_softmax_(slope, q.probs)
        head = self._head_share(p.probs, q.probs)
        reverse, summands = relative_entropy_(Softmax(q.log_probs.clone(), q.probs, q.log_total), p)
        forward, _ = relative_entropy_(p, q)
        loss = head * forward + (1.0 - head) * reverse
        if not grad:
            return loss, None
        summands.addcmul_(q.probs, reverse.unsqueeze(-1), value=-1.0).mul_((1.0 - head).unsqueeze(-1))
        return loss, summands.addcmul_(q.probs.sub_(p.probs), head.unsqueeze(-1))

    def _head_share(self, p: Tensor, q: Tensor) -> Tensor:
        """``[N]``, the head's share of the gaps between both distributions."""
        ordered, order = torch.sort(p, dim=-1, descending=True, stable=True)
        tail = ordered.cumsum(-1) > self.mu
        tail[:, 0] = False
        gap = (p - q).abs_().gather(-1, order)
        return _share(gap.masked_fill(tail, 0.0).sum(-1), gap.sum(-1))

    def _as_in_taid(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """``between`` by the other convention."""
        p = log_p.exp()
        head = p.sort(-1).values.cumsum(-1) >= self.mu
        gap = (p - log_q.exp()).abs()
        share = _share((gap * head).sum(-1), gap.sum(-1))
        cross_entropy = -torch.where(p > 0, p * log_q, 0.0).sum(-1)
        return share * cross_entropy + (1.0 - share) * kl_divergence(log_q, log_p)


class CrossEntropy(DistillationLoss):
    """Cross-entropy with the right tokens, −log q(target): learning from the data, without a teacher."""

    needs = frozenset({"targets"})
    scratch = 1

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        log_q = upcast(student_logits).log_softmax(-1)
        return -log_q.gather(-1, need_targets(targets).unsqueeze(-1)).squeeze(-1)

    def streamed(self) -> Form:
        return Form(Kind.CROSS_ENTROPY, t=0.0)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        index = need_targets(targets).unsqueeze(-1)
        q = softmax_(upcast(student_logits))
        loss = -q.log_probs.gather(-1, index).squeeze(-1)
        if not grad:
            return RowResult(loss)
        return RowResult(loss, q.probs.scatter_add_(-1, index, q.probs.new_full(index.shape, -1.0)))


def _share(part: Tensor, total: Tensor) -> Tensor:
    """part/total ``[N]``; ½ where there is nothing to share."""
    return torch.where(total > 0, part / torch.where(total > 0, total, 1.0), 0.5)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share·p + (1−share)·q), differentiable; 0 where the mixture underflows, and both summands with it."""
    mixture = share * log_p.exp() + (1.0 - share) * log_q.exp()
    return torch.where(mixture > 0, mixture, 1.0).log()


def _mixture(p: Softmax, q: Softmax, share: float) -> Tensor:
    """share·p + (1−share)·q in a new tensor, kept above 0 so that its logarithm is finite; a NaN passes through."""
    mixture = (share * p.probs).add_(q.probs, alpha=1.0 - share)
    return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny)


def _summands_(a: Softmax, log_m: Tensor) -> Tensor:
    """a·(log a − log m) for a finite ``log_m``, in the memory of ``a.log_probs``; 0·log 0 is 0."""
    return a.log_probs.clamp_(min=torch.finfo(log_m.dtype).min).sub_(log_m).mul_(a.probs)
