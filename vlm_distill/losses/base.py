"""What a loss is to the trainer, and DistillationLoss: one between logits, as the chunked engine sees it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .errors import LossError
from .groups import TokenGroups
from .kernels import Form


@dataclass(frozen=True)
class Progress:
    """How far training is when a loss is updated.

    Attributes:
        step: optimizer steps finished before the one whose signals are passed (0 at the first update).
        steps: optimizer steps of the whole run.
        epoch: passes over the data finished by then, fractions included.
        epochs: passes over the data of the whole run.
    """

    step: int
    steps: int
    epoch: float = 0.0
    epochs: float = 1.0


@dataclass
class RowResult:
    """A loss on some rows.

    Attributes:
        loss: ``[N]`` nats; ``[G]`` of groups.
        grad: ``[N, V]``, the derivative of each row's loss by that row's student logits; ``None`` unless asked for.
        signals: per-row quantities ``[N]``, named as in the loss's ``signals``.
        learned: derivatives of the summed loss by what ``DistillationLoss.learned()`` gives, made with ``grad``.
    """

    loss: Tensor
    grad: Tensor | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)
    learned: Sequence[Tensor] = ()


class Loss(nn.Module):
    """What the trainer knows of any loss.

    Attributes:
        needs: what the loss reads beside the student's side: of ``{"teacher", "targets"}``.
        signals: names of the quantities whose means over an optimizer step ``update`` is given.
        soft_targets: whether targets may be shares of the classes too, float ``[N, C]``, as of mixed images.
    """

    needs: frozenset[str] = frozenset({"teacher"})
    signals: tuple[str, ...] = ()
    soft_targets: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()  # no parameters, which nn.Module's own signature does not say

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        """Called once after every optimizer step, with the means of the signals over all rows of all ranks.

        Where there was no row, there are no signals.
        """

    def metrics(self) -> dict[str, float]:
        """What to log beside the loss."""
        return {}


class DistillationLoss(Loss):
    """One loss, row by row. ``forward`` is its definition; a subclass may add a closed form of the gradient.

    Attributes:
        takes_topk: whether ``categories`` is there, for teachers of whom only the likeliest tokens are known.
        takes_groups: whether ``grouped`` is there, for teachers with another tokenizer.
        scratch: how many ``[N, V]`` buffers ``rows`` holds at its peak beside its arguments; sizes the blocks of rows.
    """

    takes_topk: bool = False
    takes_groups: bool = False
    scratch: int = 8

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        """The definition, differentiable by autograd.

        Args:
            student_logits: ``[N, V]``, any floating dtype; 16-bit logits are raised to float32, float64 stays.
            teacher_logits: ``[N, V]``; ``None`` where the loss does not need a teacher.
            targets: int64 ``[N]``, the right token of each row; ``None`` where the loss does not need them.

        Returns:
            ``[N]``, the loss of each row in nats.
        """
        raise NotImplementedError

    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        """The same values with their gradient, outside autograd, also where gradients are switched off.

        The arguments are those of ``forward``, and THE LOGITS MAY BE OVERWRITTEN: the engine passes buffers of its own.
        """
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_(grad)
            loss = self(leaf, teacher_logits, targets)
            gradient = torch.autograd.grad(loss.sum(), leaf)[0] if grad else None
        return RowResult(loss.detach(), gradient)

    def streamed(self) -> Form | None:
        """The loss as the kernels compute it, from tiles of the vocabulary; ``None`` if it needs whole rows."""
        return None

    def prepare(self, categories: int) -> None:
        """Makes what parameters of its own the loss has, for so many tokens or classes; called once before training."""

    def learned(self) -> tuple[Tensor, ...]:
        """What ``rows`` reads of the loss's own parameters, differentiable in them.

        The engine calls it once before the rows, inside the forward of what is trained.
        """
        return ()

    def categories(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss between distributions over few categories, the last of which is the tail; only if ``takes_topk``.

        Args:
            log_p: ``[N, C]``, the teacher's log-probabilities.
            log_q: ``[N, C]``, the student's; the result is differentiable in it.

        Returns:
            ``[N]`` nats, and the signals.
        """
        raise NotImplementedError

    def grouped(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, groups: TokenGroups, *, grad: bool
    ) -> RowResult:
        """The loss of groups of rows, otherwise as ``rows``; only if ``takes_groups``.

        Args:
            student_logits: ``[N, V]``, every row in a group.
            teacher_logits: ``[M, V']``, every row in a group.
            targets: int64 ``[N]``, the student's right tokens.
            groups: G of them, with the teacher's right tokens.
            grad: whether to make the gradient.
        """
        raise NotImplementedError


class BatchLoss(Loss):
    """A loss between logits that compares the rows of a batch with one another, and so has one value for a batch.

    Attributes:
        views: how many views of each image it compares; the first views of all images come first.
    """

    views: ClassVar[int] = 1

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
        """The definition, differentiable by autograd.

        Args:
            student_logits: ``[views·N, C]``, any floating dtype; raised to float32 at least.
            teacher_logits: ``[views·N, C]``, detached.
            targets: int64 ``[N]``, the right class of each image; ``None`` where the loss does not need them.

        Returns:
            0-d, a mean over the N images.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Term:
    """One summand of the training loss that compares logits."""

    name: str
    loss: DistillationLoss
    weight: float = 1.0


def upcast(logits: Tensor | None) -> Tensor:
    """float32 at least: 16-bit logits are converted, float32 and float64 returned as they are."""
    if logits is None:
        raise ValueError("this loss compares with a teacher and was given no teacher logits")
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def need_targets(targets: Tensor | None) -> Tensor:
    if targets is None:
        raise ValueError("this loss reads the right tokens and was given no targets")
    return targets


class Softmax(NamedTuple):
    """A softmax over the last dimension: ``[N, V]``, ``[N, V]`` and ``[N, 1]``.

    ``log_total`` is the logarithm of the normaliser after the row's maximum was taken off.
    """

    log_probs: Tensor
    probs: Tensor
    log_total: Tensor


def softmax_(logits: Tensor) -> Softmax:
    """Log-probabilities in the memory of the logits, probabilities in a new tensor, from one exponential an entry."""
    logits.sub_(logits.amax(-1, keepdim=True))
    probs = logits.exp()
    total = probs.sum(-1, keepdim=True)
    log_total = total.log()
    return Softmax(logits.sub_(log_total), probs.div_(total), log_total)


def relative_entropy_(a: Softmax, b: Softmax) -> tuple[Tensor, Tensor]:
    """KL(a‖b) ``[N]`` and its summands ``a·(log a − log b)`` ``[N, V]``, in the memory of ``a.log_probs``.

    Outside the support of ``a`` a summand is 0 (also where both logits are −∞); where only ``b`` is 0 it is +∞.
    """
    # Where a = 0 the difference is −∞ or NaN. A masked fill would cost ten times as much here as nan_to_num, but
    # nan_to_num also hides a NaN among b's logits, which has spread to its whole row: b.log_total brings it back.
    ratio = a.log_probs.sub_(b.log_probs).nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0)
    summands = ratio.mul_(a.probs)
    return summands.sum(-1) + 0.0 * b.log_total.squeeze(-1), summands


def entropy(log_probs: Tensor, probs: Tensor) -> Tensor:
    """``[N]`` nats of a distribution ``[N, V]``; 0·log 0 is 0."""
    return -log_probs.clamp(min=torch.finfo(log_probs.dtype).min).mul_(probs).sum(-1)


def through_softmax_(slope: Tensor, q: Tensor) -> Tensor:
    """From q·dL/dq to dL/dlogits = q·dL/dq − q·Σ q·dL/dq ``[N, V]``, in the memory of ``slope``."""
    return slope.addcmul_(q, slope.sum(-1, keepdim=True), value=-1.0)


def soften_(student_logits: Tensor, teacher_logits: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Both models' logits, upcast and divided by the temperature, in their own memory where that is float32 already."""
    student, teacher = upcast(student_logits), upcast(teacher_logits)
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    return student, teacher


#: Of a loss's parameters: its square is a float32, too.
LARGEST = 1e18


def check_number(where: str, value: Any, low: float, high: float = LARGEST, *, above: bool = False) -> float:
    """A parameter as a float.

    Args:
        where: the loss and the parameter, for the message.
        value: what was given.
        low: the least value allowed, or with ``above`` the value that it must exceed.
        high: the greatest value allowed.
        above: whether ``low`` itself is refused.

    Raises:
        LossError: ``value`` is no number in that range, or of more than :data:`LARGEST`.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and abs(value) > LARGEST:
        raise LossError(f"{where} is {value!r}; give a number of at most {LARGEST:g}")
    if not number or not (low < value if above else low <= value) or value > high:
        span = f"above {low:g}" if above else f"of {low:g} or more" if high == LARGEST else f"from {low:g} to {high:g}"
        raise LossError(f"{where} is {value!r}; give a number {span}")
    return float(value)


def check_choice(where: str, value: Any, choices: Sequence[str]) -> str:
    """``value``, which must be one of ``choices``; raises ``LossError`` naming the loss, the parameter and them."""
    if value not in choices:
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise LossError(f"{where} is {value!r}{near}; it must be one of {', '.join(choices)}")
    return str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a message: the known name nearest to a mistyped one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
