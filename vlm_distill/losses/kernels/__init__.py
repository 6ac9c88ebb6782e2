"""Losses from tiles of logits: statistics streamed over the vocabulary, gradients written tile by tile.

One kernel gathers a row's statistics, one writes its gradient; both serve every loss of ``Kind``. Losses that compare
with a mixture of both distributions need a second pass for their sums, once the normalisers are known. Triton runs on
a GPU, its torch twin everywhere else.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import twin
from .forms import Form, Kind, Source, agree

__all__ = ["Form", "Kind", "RowStatistics", "Source", "agree", "rows"]


class RowStatistics:
    """What one loss has to know of ``n`` rows, gathered from tiles ``[n, v]`` of logits that make up the vocabulary.

    The order is ``gather`` of every tile, ``settle``, ``mix`` of every tile if the form is mixed, then the results and
    ``gradient`` of any tile. Logits are float32 or float64, rows may have any stride, columns are adjacent.

    With x the target's logits and y the student's, a row's running state is the maximum of x and Σe^x less the
    maximum, the same of y, Σe^x (x−y), Σe^y (y−x), Σe^x x and Σe^x (x−y)², each x and y less its maximum so far, and
    the right token's y. Taking off the maxima keeps float32 exact to its last digits where logits are large.
    """

    def __init__(self, form: Form, count: int, like: Tensor) -> None:
        self.form = form
        self._state = like.new_zeros(count, 9)
        self._state[:, 0:3:2] = -torch.inf
        self._totals = self._state
        self._engine = _engine(like)

    def gather(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> None:
        """Takes in a tile; ``targets`` count from its first column and are read by cross-entropy alone."""
        self._engine.gather_(self.form, student, teacher, targets, self._state)

    def settle(self) -> None:
        """Closes the first pass."""
        top_x, sum_x, top_y, sum_y, forward, reverse, spread, square, right = self._state.unbind(1)
        log_x, log_y = sum_x.log(), sum_y.log()
        self._kl = forward / sum_x - log_x + log_y
        self._entropy = log_x - spread / sum_x
        self._variance = square / sum_x - (forward / sum_x).square()
        loss = slope = torch.zeros_like(log_x)
        if self.form.kind == Kind.FORWARD_KL:
            loss = self._kl
            slope = slope - 1.0
        elif self.form.kind == Kind.REVERSE_KL:
            loss = slope = reverse / sum_y - log_y + log_x
        elif self.form.kind == Kind.CROSS_ENTROPY:
            loss = log_y - (right - top_y)
        self._totals = torch.stack([top_x, log_x, top_y, log_y, loss, slope], dim=1)

    def mix(self, student: Tensor, teacher: Tensor) -> None:
        """Takes in a tile a second time; only where ``form.mixed``."""
        self._engine.mix_(self.form, student, teacher, self._totals)

    def loss(self) -> Tensor:
        """``[n]`` nats."""
        return self._totals[:, 4] * self.form.factor

    def signals(self) -> dict[str, Tensor]:
        """``[n]``, p the target: KL(p‖q), p's entropy and their sum in nats; with ``form.slope`` Var_p(log p/q)."""
        found = {
            "kl": self._kl,
            "target_entropy": self._entropy,
            "cross_entropy": self._kl + self._entropy,
        }
        return found | {"slope": self._variance} if self.form.slope else found

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        out: Tensor,
        targets: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        add: bool = False,
    ) -> None:
        """``scale`` times the derivative of each row's loss by a tile of the student's logits, into ``out [n, v]``.

        Args:
            student, teacher, targets: as for ``gather``.
            out: of any floating dtype; may be ``student`` itself.
            scale: see above.
            softcap: if the logits are c·tanh(z/c), c; the derivative is then by z.
            add: whether to add to what ``out`` holds.
        """
        scale *= self.form.factor / self.form.temperature
        self._engine.gradient_(
            self.form, student, teacher, targets, self._totals, out, scale=scale, softcap=softcap, add=add
        )


def rows(
    form: Form, student: Tensor, teacher: Tensor, *, grad: bool
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """A loss on whole rows ``[N, V]`` of float32 or float64 logits; the gradient takes the student's memory.

    Returns:
        The loss ``[N]`` in nats, its gradient by the student's logits, and the signals.
    """
    statistics = RowStatistics(form, len(student), student)
    statistics.gather(student, teacher)
    statistics.settle()
    if form.mixed:
        statistics.mix(student, teacher)
    if grad:
        statistics.gradient(student, teacher, student)
    return statistics.loss(), student if grad else None, statistics.signals()


def _engine(like: Tensor) -> ModuleType:
    wanted = like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if wanted and like.dtype == torch.float32 and _has_triton():
        from . import triton_rows

        return triton_rows
    return twin


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
