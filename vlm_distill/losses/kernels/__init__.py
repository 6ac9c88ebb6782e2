"""Losses from tiles of logits: statistics are streamed over the vocabulary, gradients written tile by tile.

One kernel accumulates a row's statistics and one writes its gradient; both serve every loss of ``Kind``. Losses that
compare with a mixture of both distributions need a second pass for their sums, once the normalisers are known. On a GPU
the kernels are Triton's; everywhere else they are written in torch.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import torch_kernels
from .forms import ALPHA_BETA_FLOOR, Form, Kind, Source, agree

__all__ = ["ALPHA_BETA_FLOOR", "Form", "Kind", "RowStatistics", "Source", "agree", "loss_and_grad"]


class RowStatistics:
    """One loss's statistics of ``n`` rows, accumulated from tiles ``[n, v]`` of logits that cover the vocabulary.

    Call, in this order: ``accumulate`` with every tile, ``finalize``, ``accumulate_mixture`` with every tile if the
        form
    is mixed; then read the results, and call ``gradient`` with any tile. Logits are float32 or float64; rows may have
    any stride, columns must be adjacent.

    With x the target's logits and y the student's, a row's running state is: the maximum of x; Σe^x; the maximum of y;
    Σe^y; Σe^x (x−y); Σe^y (y−x); Σe^x x; Σe^x (x−y)²; the right token's y. Except in the last, x and y are taken
    relative to their maximum so far, which keeps float32 exact to its last digits where logits are large.
    """

    def __init__(self, form: Form, count: int, like: Tensor) -> None:
        self.form = form
        self._state = like.new_zeros(count, 9)
        self._state[:, 0:3:2] = -torch.inf
        self._totals = self._state
        self._engine = _engine(like)

    def accumulate(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> None:
        """Add a tile. ``targets`` count from its first column; only cross-entropy reads them."""
        self._engine.accumulate_(self.form, student, teacher, targets, self._state)

    def finalize(self) -> None:
        """Compute normalisers, loss and signals from the accumulated state."""
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

    def accumulate_mixture(self, student: Tensor, teacher: Tensor) -> None:
        """Add a tile to the sums that need the normalisers; only if ``form.mixed``."""
        self._engine.accumulate_mixture_(self.form, student, teacher, self._totals)

    def loss(self) -> Tensor:
        """Return the loss of each row, ``[n]`` nats."""
        return self._totals[:, 4] * self.form.factor

    def signals(self) -> dict[str, Tensor]:
        """Return ``[n]`` each, p being the target: KL(p‖q), p's entropy, their sum, and Var_p(log p/q) if requested."""
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
        """Write ``scale`` times the derivative of each row's loss by a tile of the student's logits.

        Args:
            student, teacher, targets: as for ``accumulate``.
            out: receives the gradient ``[n, v]``; any floating dtype, may be ``student`` itself.
            scale: factor of the gradient.
            softcap: c if the logits are c·tanh(z/c); the derivative is then by z.
            add: whether to add to ``out`` instead of overwriting it.
        """
        scale *= self.form.factor / self.form.temperature
        self._engine.gradient_(
            self.form, student, teacher, targets, self._totals, out, scale=scale, softcap=softcap, add=add
        )


def loss_and_grad(
    form: Form, student: Tensor, teacher: Tensor, *, grad: bool
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Compute a loss on whole rows ``[N, V]`` of float32 or float64 logits; the gradient overwrites the student's.

    Returns:
        The loss ``[N]`` in nats, its gradient by the student's logits (``None`` without ``grad``), and the signals.
    """
    statistics = RowStatistics(form, len(student), student)
    statistics.accumulate(student, teacher)
    statistics.finalize()
    if form.mixed:
        statistics.accumulate_mixture(student, teacher)
    if grad:
        statistics.gradient(student, teacher, student)
    return statistics.loss(), student if grad else None, statistics.signals()


def _engine(like: Tensor) -> ModuleType:
    """Return the module that holds the kernels for tensors like this one."""
    wanted = like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if wanted and like.dtype == torch.float32 and _has_triton():
        from . import triton_kernels

        return triton_kernels
    return torch_kernels


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
