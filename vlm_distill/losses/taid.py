"""TAID: a target that moves from the student's own distribution to the teacher's (Shing et al., ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .base import DistillationLoss, Progress, RowResult
from .catalogue import build_divergence
from .errors import LossError
from .forward_kl import ForwardKL
from .kernels import Form
from .parameters import check_choice, check_flag, check_number
from .softmax import entropy, kl_divergence, kl_of_logits_, relative_entropy_, softmax_, upcast
from .taid_pace import Pace, sigmoid

# In the schedule `adaptive`, t never lags behind (n/N)³ of its way: far below the line for most of the run, and t_end
# at its end.
_FLOOR_POWER = 3.0

SCHEDULES = ("paper", "linear", "cosine", "exponential", "adaptive")


class TAID(DistillationLoss):
    """D(p_t, q), p_t = softmax((1−t)·student, detached, + t·teacher); t grows over training (Shing et al., 2025).

    Only ``update`` moves t; evaluation does not.

    Args:
        t_start: t of the first step.
        t_end: t at the end.
        schedule: how t moves after each optimizer step, n of N steps being done.

            - ``paper``: the released rule. With J the mean cross-entropy of p_t and q over the step and J' that of the
              step before, δ = (J' − J)/(J' + 1e-15), m = beta·m + (1−beta)·δ, and
              t = min(t_end, max(line, t + alpha·sigmoid(m)·(1−t))), line = t_start + (t_end − t_start)·n/N.
              A non-finite J changes neither J' nor m, and t becomes max(line, t). t never falls.
            - ``linear``: the line alone.
            - ``cosine``: half a cosine, slow at both ends.
            - ``exponential``: fast at first; t_end − t shrinks by a factor e^−rate over the run.
            - ``adaptive``: our own; see :class:`Pace` and docs/taid.md.
        alpha, beta: of the schedule ``paper``.
        rate: of the schedules ``exponential`` and ``adaptive``.
        divergence: D, a name or ``{name: jsd, beta: 0.1}``. Its gradient treats p_t as constant; for ``forward_kl`` it
            is q − p_t.
        power: the mean that forms p_t: 0 mixes logits (the paper), 1 probabilities, any other r > 0 takes
            p_t ∝ ((1−t)·q^r + t·p^r)^(1/r).
        target_entropy: whether to log the target's entropy.
    """

    signals: tuple[str, ...] = ("kl",)

    def __init__(
        self,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        schedule: str = "paper",
        rate: float = 3.0,
        divergence: str | Mapping[str, Any] = "forward_kl",
        power: float = 0.0,
        target_entropy: bool = False,
    ) -> None:
        super().__init__()
        self.t_start = check_number("loss taid: t_start", t_start, 0.0, 1.0)
        self.t_end = check_number("loss taid: t_end", t_end, 0.0, 1.0)
        check_flag("loss taid: target_entropy", target_entropy)
        if self.t_end < self.t_start:
            raise LossError(f"loss taid: t_end = {t_end} lies below t_start = {t_start}; t must not fall")
        self.alpha = check_number("loss taid: alpha", alpha, 0.0)
        self.beta = check_number("loss taid: beta", beta, 0.0, 1.0)
        self.schedule = check_choice("loss taid: schedule", schedule, SCHEDULES)
        self.rate = check_number("loss taid: rate", rate, 0.0, above=True)
        self.power = check_number("loss taid: power", power, 0.0)
        self.divergence = build_divergence("loss taid: divergence", divergence)
        self.takes_topk = True
        self._declare_signals(target_entropy)
        # Plain floats and not buffers: casting the module to bfloat16 would round a buffer.
        self._t = self.t_start
        self._momentum = 0.0
        self._previous = math.inf
        self._pace = Pace()

    def _declare_signals(self, target_entropy: bool) -> None:
        """Set ``signals`` and, since they need buffers, ``scratch``."""
        # Only the released rule reads the target's entropy, which costs a pass over the logits.
        if self.schedule == "paper":
            self.signals = ("kl", "cross_entropy")
        elif self.schedule == "adaptive":
            self.signals = ("kl", "slope")
        if target_entropy:
            self.signals += ("target_entropy",)
        if self.schedule == "adaptive":
            own = 5
        elif len(self.signals) > 1 or not isinstance(self.divergence, ForwardKL):
            own = 3
        else:
            own = 2
        self.scratch = max(own, self.divergence.scratch)

    @property
    def t(self) -> float:
        """The teacher's share in the target, 0 to 1."""
        return self._t

    @t.setter
    def t(self, value: float) -> None:
        self._t = check_number("loss taid: t", value, 0.0, 1.0)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        log_target = self._mixed(student.detach().clone(), teacher.clone()).log_softmax(-1)
        return self.divergence.value(log_target, student.log_softmax(-1))

    def _mixed(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the target's logits ``[N, V]``, in the memory of the teacher's."""
        # 0·∞ counts as 0: a model with no share does not change the other's logits.
        if self._t == 0.0:
            return teacher.copy_(student)
        if self._t == 1.0:
            return teacher
        if self.power == 0.0:
            return teacher.mul_(self._t).add_(student, alpha=1.0 - self._t)
        own = student.log_softmax(-1).mul_(self.power).add_(math.log1p(-self._t))
        other = teacher.log_softmax(-1).mul_(self.power).add_(math.log(self._t))
        return torch.logaddexp(own, other, out=teacher).div_(self.power)

    def _slope(self, size: Tensor, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Compute dKL(p_t‖q)/d log t ``[N]`` for a student that stands still.

        With ρ = log p_t/q it is the covariance under p_t of ρ and t·dρ/dt. The latter is ρ itself if logits are mixed,
        and (1 − e^(−r (ρ + c)))/r for a power r, e^c being the sum that normalises p_t; both up to a constant.

        Args:
            size: ``[N, 1]``, c; not read if logits are mixed.
            p, log_p, log_q: ``[N, V]``.
        """
        ratio = torch.where(p > 0, log_p - log_q, 0.0)
        weighted = p * ratio
        if self.power != 0.0:
            ratio = ratio.add_(size).mul_(-self.power).expm1_().div_(-self.power)
        return (weighted * ratio).sum(-1) - weighted.sum(-1) * ratio.mul_(p).sum(-1)

    def _size(self, mixed: Tensor) -> Tensor:
        """Compute the logarithm ``[N, 1]`` of the sum that normalises a target; 0 if the target is not mixed."""
        whole = self.power == 0.0 or self._t == 1.0
        return mixed.new_zeros(len(mixed), 1) if whole else mixed.logsumexp(-1, keepdim=True)

    def kernel_form(self) -> Form | None:
        # Mixing probabilities needs both normalisers before there is a target.
        form = self.divergence.kernel_form() if self.power == 0.0 else None
        return None if form is None else form._replace(t=self._t, slope="slope" in self.signals)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        form = self.kernel_form()
        if form is not None and student_logits.is_cuda:
            loss, gradient, measured = kernels.loss_and_grad(
                form, upcast(student_logits), upcast(teacher_logits), grad=grad
            )
            return RowResult(loss, gradient, {name: measured[name] for name in self.signals})
        student = upcast(student_logits)
        mixed = self._mixed(student, upcast(teacher_logits))
        wants_entropy = bool({"cross_entropy", "target_entropy"} & set(self.signals))
        if isinstance(self.divergence, ForwardKL) and "slope" not in self.signals:
            found = kl_of_logits_(mixed, student, grad=grad, with_entropy=wants_entropy)
            loss, gradient = found.value, found.gradient
            signals = {"kl": loss}
            if found.entropy is not None:
                signals["target_entropy"] = found.entropy
        else:
            loss, gradient, signals = self._compared(mixed, student, grad=grad, with_entropy=wants_entropy)
        if "cross_entropy" in self.signals:
            signals["cross_entropy"] = signals["target_entropy"] + signals["kl"]
        return RowResult(loss, gradient, {name: signals[name] for name in self.signals})

    def _compared(
        self, mixed: Tensor, student: Tensor, *, grad: bool, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Compute loss, gradient and signals for any divergence, from both normalised distributions."""
        size = self._size(mixed)
        p, q = softmax_(mixed), softmax_(student)
        signals: dict[str, Tensor] = {}
        if "slope" in self.signals:
            signals["slope"] = self._slope(size, p.probs, p.log_probs, q.log_probs)
        if with_entropy:
            signals["target_entropy"] = entropy(p.log_probs, p.probs)
        if isinstance(self.divergence, ForwardKL):
            loss, gradient = self.divergence.value_and_grad(p, q, grad=grad)
            return loss, gradient, signals | {"kl": loss}
        signals["kl"] = relative_entropy_(p._replace(log_probs=p.log_probs.clone()), q)[0]
        return *self.divergence.value_and_grad(p, q, grad=grad), signals

    def loss_over_categories(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = log_q.detach()
        mixed = self._mixed(own.clone(), log_p.clone())
        target = mixed.log_softmax(-1)
        loss = self.divergence.value(target, log_q)
        signals = {"kl": loss if isinstance(self.divergence, ForwardKL) else kl_divergence(target, own)}
        if {"cross_entropy", "target_entropy"} & set(self.signals):
            signals["target_entropy"] = entropy(target, target.exp())
            signals["cross_entropy"] = signals["kl"] + signals["target_entropy"]
        if "slope" in self.signals:
            signals["slope"] = self._slope(self._size(mixed), target.exp(), target, own)
        return loss, {name: signals[name] for name in self.signals}

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        if self.schedule == "adaptive":
            proposed = self._adaptive(signals, progress)
        elif self.schedule == "paper":
            proposed = max(self._curve(progress), self._paper(signals))
        else:
            proposed = self._curve(progress)
        self._t = max(self._t, min(self.t_end, proposed))

    def _curve(self, progress: Progress) -> float:
        """Return t by the schedules that depend on progress only; the line for the others."""
        done = progress.step / max(progress.steps, 1)
        span = self.t_end - self.t_start
        if self.schedule == "cosine":
            return self.t_start + span * (1.0 - math.cos(math.pi * done)) / 2.0
        if self.schedule == "exponential":
            return self.t_start + span * math.expm1(-self.rate * done) / math.expm1(-self.rate)
        return self.t_start + span * done

    def _paper(self, signals: Mapping[str, float]) -> float:
        """Return t by the feedback of the schedule ``paper``; t itself without two finite losses."""
        loss = float(signals.get("cross_entropy", math.nan))
        if not math.isfinite(loss):
            return self._t
        previous, self._previous = self._previous, loss
        if not math.isfinite(previous):
            return self._t
        change = (previous - loss) / (previous + 1e-15)
        self._momentum = self.beta * self._momentum + (1.0 - self.beta) * change
        return self._t + self.alpha * sigmoid(self._momentum) * (1.0 - self._t)

    def _adaptive(self, signals: Mapping[str, float], progress: Progress) -> float:
        """Return t by the pace at which the student closes in on its teacher."""
        steps = max(progress.steps, 1)
        pace = self._pace.after(
            float(signals.get("kl", math.nan)), float(signals.get("slope", math.nan)), self._t, steps
        )
        floor = self.t_start + (self.t_end - self.t_start) * ((progress.step + 1) / steps) ** _FLOOR_POWER
        return max(floor, self._t + self.rate * pace * (self.t_end - self._t) / steps)

    def metrics(self) -> dict[str, float]:
        return {"t": self._t}

    def get_extra_state(self) -> dict[str, Any]:
        state = {"t": self._t, "momentum": self._momentum, "previous": self._previous}
        return state | {"pace": self._pace.state()}

    def set_extra_state(self, state: Any) -> None:
        self._t, self._momentum, self._previous = (float(state[k]) for k in ("t", "momentum", "previous"))
        self._pace = Pace(*state["pace"])
