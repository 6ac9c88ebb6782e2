"""Curriculum temperature: KD at a temperature that learns against the student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import DistillationLoss, Progress, RowResult
from .errors import LossError
from .parameters import check_flag, check_number
from .softmax import kl_divergence, relative_entropy_, softmax_, upcast


class CTKD(DistillationLoss):
    """Curriculum temperature KD, T²·KL(p‖q), T = t_start + t_range·sigmoid(g), g learnt to raise it (Li et al., 2023).

    The gradient by g is multiplied by a negative coefficient c, so the optimizer that lowers the loss through the
    student's weights raises it through g; the task grows harder as c goes from 0 to −1. There is one g for all tokens,
    or with ``instance`` one for each: a perceptron with one hidden layer computes it from both models' probabilities
    (concatenated, at temperature 1), which are constants to it.

    Args:
        t_start: the lowest temperature.
        t_range: the span above it.
        g: initial g of every token; 1 in the authors' code.
        loops: epochs in which c goes from one end of ``decay`` to the other by half a cosine. After e epochs, fractions
            included, c(e) = b + (a − b)/2 · (1 + cos(π·min(e, loops)/loops)).
        decay: a and b, the first and the last c; None is (0, −1), as in the paper.
        grl_coefficient: a constant c, instead of ``loops`` and ``decay``.
        instance: a temperature for each token; ``prepare`` creates its perceptron.
        width: of the perceptron's hidden layer.
    """

    needs = frozenset({"teacher"})
    signals = ("temperature",)
    scratch = 4

    def __init__(
        self,
        t_start: float = 1.0,
        t_range: float = 20.0,
        g: float = 1.0,
        loops: float = 10.0,
        decay: Sequence[float] | None = None,
        grl_coefficient: float | None = None,
        instance: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.t_start = check_number("loss ctkd: t_start", t_start, 0.0, above=True)
        self.t_range = check_number("loss ctkd: t_range", t_range, 0.0)
        self.loops = check_number("loss ctkd: loops", loops, 0.0, above=True)
        if decay is not None and grl_coefficient is not None:
            raise LossError("loss ctkd: grl_coefficient is constant, and decay changes it; give one of them")
        self.decay = _ends((0.0, -1.0) if decay is None else decay)
        self._fixed = grl_coefficient is not None
        self.coefficient = self.decay[0]
        if grl_coefficient is not None:
            self.coefficient = check_number("loss ctkd: grl_coefficient", grl_coefficient, -math.inf)
        check_flag("loss ctkd: instance", instance)
        self.width = int(check_number("loss ctkd: width", width, 1.0)) if instance else 0
        # g alone, until `prepare` puts the perceptron in front of it.
        self.source = _Source(g=torch.tensor([check_number("loss ctkd: g", g, -math.inf)]))
        if instance:
            self.scratch = 8
        self._held: tuple[Tensor, ...] = ()

    def prepare(self, categories: int) -> None:
        if self.width:
            g = self.source.g.detach()
            first = torch.empty(self.width, 2 * categories)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5))
            # Its last layer is 0, so it starts as one temperature for all.
            parts = {"first": first, "shift": torch.zeros(self.width), "last": torch.zeros(1, self.width), "g": g}
            self.source = _Source(**parts)

    def learned_tensors(self) -> tuple[Tensor, ...]:
        values = self.source(self.coefficient)
        self._held = tuple(value.detach() for value in values)
        return values

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        temperature = self._temperature(self.learned_tensors(), student.detach(), teacher)
        log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
        return temperature.squeeze(-1) ** 2 * kl_divergence(log_p, log_q)

    def _temperature(self, values: Sequence[Tensor], student: Tensor, teacher: Tensor) -> Tensor:
        """Compute T of each row ``[N, 1]`` from what ``learned_tensors`` returns, differentiable in it."""
        values = [value.to(student.dtype) for value in values]
        if self.width and len(values) == 1:
            raise RuntimeError("loss ctkd: with instance=True, call prepare(categories) first")
        *layers, g = values
        if layers:
            first, shift, last = layers
            seen = torch.cat([student.softmax(-1), teacher.softmax(-1)], dim=-1)
            g = torch.relu(seen @ first.t() + shift) @ last.t() + g
        return self.t_start + self.t_range * torch.sigmoid(g).expand(len(student), 1)

    @torch.no_grad()
    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        student, teacher = upcast(student_logits), upcast(teacher_logits)
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_(grad) for value in self._held or self.learned_tensors()]
            made = self._temperature(leaves, student, teacher)
        temperature = made.detach()
        squared, signals = temperature.squeeze(-1) ** 2, {"temperature": temperature.squeeze(-1)}
        p, q = softmax_(teacher.div_(temperature)), softmax_(student.div_(temperature))
        if not grad:
            return RowResult(squared * relative_entropy_(p, q)[0], None, signals)
        # The lower limit makes 0·log 0 = 0. Log-probabilities may replace softened logits: they differ by a constant,
        # and the weights below sum to 0.
        least = torch.finfo(student.dtype).min
        log_p, log_q = p.log_probs.clamp(min=least), q.log_probs.clamp(min=least)
        kl, summands = relative_entropy_(p, q)
        weights = summands.addcmul_(p.probs, kl.unsqueeze(-1), value=-1.0)
        gap = q.probs.sub_(p.probs)
        # T·dKL/dT = −Σ (q−p) log q − Σ p (log p/q − KL) log p
        slope = -(log_q.mul_(gap).sum(-1) + log_p.mul_(weights).sum(-1))
        by_temperature = temperature * (2.0 * kl + slope).unsqueeze(-1)
        learned = torch.autograd.grad(made, leaves, by_temperature)
        return RowResult(squared * kl, gap.mul_(temperature), signals, learned)

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        if not self._fixed:
            first, last = self.decay
            done = min(progress.epoch / self.loops, 1.0)
            self.coefficient = last + (first - last) / 2.0 * (1.0 + math.cos(math.pi * done))

    def metrics(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def get_extra_state(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def set_extra_state(self, state: Any) -> None:
        self.coefficient = float(state["coefficient"])


def _ends(decay: Any) -> tuple[float, float]:
    if not isinstance(decay, list | tuple) or len(decay) != 2:
        raise LossError(f"loss ctkd: decay is {decay!r}; give two numbers, the first coefficient and the last: [0, -1]")
    first, last = (check_number("loss ctkd: decay", end, -math.inf) for end in decay)
    return first, last


class _Source(nn.Module):
    """The parameters behind g. A module of its own, because calling it gathers parameters that are sharded."""

    g: nn.Parameter

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        # Not 0-dimensional, which DeepSpeed refuses; no name on which weight decay depends.
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, coefficient: float) -> tuple[Tensor, ...]:
        """Return the values; their gradients are multiplied by ``coefficient``."""
        return tuple(p.detach() + coefficient * (p - p.detach()) for p in self.parameters())
