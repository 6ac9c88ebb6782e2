"""Base classes: ``Loss`` (what the trainer sees), ``DistillationLoss`` and ``BatchLoss`` (losses between logits)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .errors import LossError
from .groups import TokenGroups
from .kernels import Form


@dataclass(frozen=True)
class Progress:
    """How far training has come when a loss is updated.

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
    """The loss of each row of some logits.

    Attributes:
        loss: ``[N]`` nats; ``[G]`` for groups.
        grad: ``[N, V]``, the derivative of the summed loss by the student's logits; ``None`` unless requested.
        signals: ``[N]`` each, under the names in the loss's ``signals``.
        learned: derivatives of the summed loss by ``DistillationLoss.learned_tensors()``; present if ``grad`` is.
    """

    loss: Tensor
    grad: Tensor | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)
    learned: Sequence[Tensor] = ()


class Loss(nn.Module):
    """What the trainer knows of any loss.

    Attributes:
        needs: what the loss reads besides the student, a subset of ``{"teacher", "targets"}``.
        signals: names of the quantities whose means over an optimizer step are passed to ``update``.
        soft_targets: whether targets may also be shares of the classes, float ``[N, C]``, as for mixed images.
    """

    needs: frozenset[str] = frozenset({"teacher"})
    signals: tuple[str, ...] = ()
    soft_targets: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()  # nn.Module's own signature takes anything; the registry reads parameters from this one

    def update(self, signals: Mapping[str, float], progress: Progress) -> None:
        """Update state after an optimizer step.

        Args:
            signals: means over all ranks; empty if the step had no rows.
            progress: of the run.
        """

    def metrics(self) -> dict[str, float]:
        """Return what to log beside the loss."""
        return {}


class DistillationLoss(Loss):
    """A loss between logits, one value per row.

    ``forward`` is its definition and all that a subclass must write. For speed, a subclass may add a closed form of the
    gradient (``loss_and_grad``) and the form that the kernels compute (``kernel_form``).

    Attributes:
        takes_topk: whether ``loss_over_categories`` exists, for teachers that give their likeliest tokens only.
        takes_groups: whether ``grouped_loss_and_grad`` exists, for teachers with another tokenizer.
        takes_tokens: whether ``token_loss_and_grad`` exists, for teachers that give the log-probabilities of the
            answer's own tokens only. Such a loss reads the answers without calling them correct: it also learns from
            answers that the student drew.
        on_drawn_only: whether the loss estimates something from answers that the student drew, and means nothing on
            others.
        needs_shared_tokens: whether ``share_tokens`` must be called before training.
        adapts: whether the loss adapts to each answer as a whole (``adapted``). It reads the answers without calling
            them correct.
        scratch: most ``[N, V]`` buffers that ``loss_and_grad`` holds at once besides its arguments; sizes the blocks.
    """

    takes_topk: bool = False
    takes_groups: bool = False
    takes_tokens: bool = False
    on_drawn_only: bool = False
    needs_shared_tokens: bool = False
    adapts: bool = False
    scratch: int = 8

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None) -> Tensor:
        """Compute the loss of each row; differentiable by autograd.

        Args:
            student_logits: ``[N, V]``, any floating dtype; 16-bit logits are raised to float32, float64 stays.
            teacher_logits: ``[N, V]``; ``None`` if the loss needs no teacher.
            targets: int64 ``[N]``, the right token of each row; ``None`` if the loss needs none.

        Returns:
            ``[N]`` nats.
        """
        raise NotImplementedError

    def loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None = None, *, grad: bool
    ) -> RowResult:
        """Compute the loss and its gradient without autograd. May overwrite both logits tensors.

        Takes the arguments of ``forward``; ``grad`` requests the gradient, whether or not autograd is recording.

        Raises:
            LossError: ``forward`` does not return a value per row; their mean would count each block of rows alike.
        """
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_(grad)
            loss = self(leaf, teacher_logits, targets)
            if loss.shape != leaf.shape[:1]:
                raise LossError(
                    f"loss {type(self).__name__}: forward returned the shape {list(loss.shape)} for {len(leaf)} rows; "
                    "return one value per row of the logits"
                )
            gradient = torch.autograd.grad(loss.sum(), leaf)[0] if grad else None
        return RowResult(loss.detach(), gradient)

    def kernel_form(self) -> Form | None:
        """Return the loss as the kernels compute it from tiles of the vocabulary; ``None`` if it needs whole rows."""
        return None

    def prepare(self, categories: int) -> None:
        """Create the loss's own parameters for this many tokens or classes. Called once, before training."""

    def share_tokens(self, student: Tensor, teacher: Tensor) -> None:
        """Receive the ids ``[K]`` of the tokens that both vocabularies have, in both. If ``needs_shared_tokens``.

        Raises:
            LossError: there are none.
        """

    def adapted(self, log_p: Tensor, log_q: Tensor, sequence_of: Tensor) -> DistillationLoss:
        """Return the loss adapted to some answers. If ``adapts``.

        Args:
            log_p: ``[S]``, the mean log-probability that the teacher gives to the tokens of each answer.
            log_q: ``[S]``, the student's.
            sequence_of: int64 ``[N]``, the number of the answer that each position belongs to.
        """
        raise NotImplementedError

    def at(self, positions: Tensor) -> DistillationLoss:
        """Return the loss at some positions ``[n]``: another one only if it was adapted to these answers."""
        return self

    def learned_tensors(self) -> tuple[Tensor, ...]:
        """Return what ``loss_and_grad`` reads of the loss's own parameters, differentiable in them.

        Called once a forward pass, inside the forward of the module that is trained, before any row is computed.
        """
        return ()

    def loss_over_categories(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss between distributions over a few categories, the last being the tail. If ``takes_topk``.

        Args:
            log_p: ``[N, C]``, the teacher's log-probabilities.
            log_q: ``[N, C]``, the student's; the result is differentiable in it.

        Returns:
            ``[N]`` nats, and the signals.
        """
        raise NotImplementedError

    def grouped_loss_and_grad(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, groups: TokenGroups, *, grad: bool
    ) -> RowResult:
        """Compute the loss of each group of rows, and its gradient as ``loss_and_grad`` does. If ``takes_groups``.

        Args:
            student_logits: ``[N, V]``; every row belongs to a group.
            teacher_logits: ``[M, V']``; every row belongs to a group.
            targets: int64 ``[N]``, the student's right tokens.
            groups: G groups, with the teacher's right tokens.
            grad: whether to compute the gradient.
        """
        raise NotImplementedError

    def token_loss_and_grad(
        self,
        student_logits: Tensor,
        teacher_log_probs: Tensor,
        targets: Tensor,
        groups: TokenGroups | None,
        *,
        grad: bool,
    ) -> RowResult:
        """Compute the loss of each row or group from the teacher's log-probabilities alone. If ``takes_tokens``.

        Args:
            student_logits: ``[N, V]``; may be overwritten.
            teacher_log_probs: ``[M]`` nats, of the teacher's right tokens; M = N without groups.
            targets: int64 ``[N]``, the student's right tokens.
            groups: of the N and M rows; ``None``: the k-th row of both is the same token.
            grad: whether to compute the gradient.
        """
        raise NotImplementedError


class BatchLoss(Loss):
    """A loss between logits that compares the rows of a batch with one another: one value per batch.

    Attributes:
        views: how many views of each image it compares; the first views of all images come first.
    """

    views: ClassVar[int] = 1

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None) -> Tensor:
        """Compute the loss of the batch; differentiable by autograd.

        Args:
            student_logits: ``[views·N, C]``, any floating dtype; raised to float32 at least.
            teacher_logits: ``[views·N, C]``, detached.
            targets: int64 ``[N]``, the right class of each image; ``None`` if the loss needs none.

        Returns:
            0-d, a mean over the N images.
        """
        raise NotImplementedError


#: How image tokens are paired: ``none``: the k-th with the k-th; ``hungarian``: those with the nearest logits;
#: ``pool``: averages over the coarser grid.
Match = Literal["none", "hungarian", "pool"]


@dataclass(frozen=True)
class Term:
    """One summand of the training loss: a loss between logits, its weight, and where both models are compared.

    Attributes:
        on: ``text``: at the positions that predict supervised tokens; ``images``: at the image tokens.
        answers: the answers that the loss acts on: the ``data``'s, the student's ``own``, or ``both``.
        mean: over what the loss is averaged: all ``tokens`` of a step, or the tokens of each answer and then the
            answers (``sequences``).
        row_weights: float64 ``[N]``, for one call: factors on the positions' losses (of a group, its first position's).
            The term's count is then their sum.
        match: how image tokens are paired.
    """

    name: str
    loss: DistillationLoss
    weight: float = 1.0
    on: Literal["text", "images"] = "text"
    answers: Literal["data", "own", "both"] = "both"
    mean: Literal["tokens", "sequences"] = "tokens"
    row_weights: Tensor | None = field(default=None, compare=False)
    match: Match = "none"

    @property
    def has_teacher(self) -> bool:
        """Whether the loss compares with a teacher."""
        return "teacher" in self.loss.needs
