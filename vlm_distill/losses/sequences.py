"""What a loss needs to know of whole answers: means over each answer's tokens, and losses that adapt to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .base import Term
from .groups import TokenGroups
from .heads import Head, HiddenTargets, ModelSide

# Logits formed at once for the log-probabilities of an answer's own tokens.
_LOGITS = 2**24


def sequence_weights(sequence_of: Tensor, compared: Tensor | TokenGroups | None = None) -> Tensor:
    """Return weights with which a sum over positions is a sum over sequences of means.

    Example: sequences of 2 and 1 positions, all compared, give 0.5, 0.5 and 1.

    Args:
        sequence_of: int64 ``[N]``, the number of the sequence that each position belongs to, ascending from 0.
        compared: which positions are compared: bool ``[N]``, or groups of them; ``None`` for all.

    Returns:
        float64 ``[N]``, 1/(number of the sequence's positions, or groups, that are compared).
    """
    if isinstance(compared, TokenGroups):
        counted = sequence_of[compared.student[:, 0]]
    else:
        counted = sequence_of if compared is None else sequence_of[compared]
    most = int(sequence_of[-1]) + 1 if len(sequence_of) else 0
    return (1.0 / counted.bincount(minlength=most).clamp(min=1).double())[sequence_of]


@torch.no_grad()
def adapt_terms(
    terms: Sequence[Term],
    student_hidden: Tensor,
    student_head: Head,
    teacher: HiddenTargets,
    targets: Tensor,
    sequence_of: Tensor,
    compared: Tensor,
) -> list[Term]:
    """Return the terms with those losses that adapt to each answer adapted to these.

    Forms both models' logits of the compared positions once more, some at a time.

    Args:
        terms: of the loss.
        student_hidden: ``[N, H]``.
        student_head: the student's.
        teacher: hidden states at the same positions, and their head.
        targets: int64 ``[N]``, the answers' tokens.
        sequence_of: int64 ``[N]``, the number of the answer that each of them belongs to, ascending from 0.
        compared: bool ``[N]``; only these positions count.
    """
    if not any(term.loss.adapts for term in terms):
        return list(terms)
    positions = compared.nonzero().flatten()
    with torch.autocast(student_hidden.device.type, enabled=False):
        ours = token_log_probs(student_head, student_hidden, targets, positions, student_hidden.dtype)
        theirs = token_log_probs(teacher.head, teacher.hidden, targets, positions, student_hidden.dtype)

    # Average over each answer's tokens.
    weights = sequence_weights(sequence_of, compared)[positions].to(ours.dtype)
    numbers = sequence_of[positions]
    most = int(sequence_of[-1]) + 1 if len(sequence_of) else 0
    log_p = ours.new_zeros(most).index_add(0, numbers, theirs * weights)
    log_q = ours.new_zeros(most).index_add(0, numbers, ours * weights)
    return [
        replace(term, loss=term.loss.adapted(log_p, log_q, sequence_of)) if term.loss.adapts else term for term in terms
    ]


def token_log_probs(head: Head, hidden: Tensor, targets: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the log-probabilities ``[n]`` of the targets ``[N]`` at some positions, at temperature 1.

    Args:
        head: the output layer.
        hidden: ``[N, H]``.
        targets: int64 ``[N]``.
        positions: int64 ``[n]``.
        dtype: of the operands, as :class:`ModelSide` takes it.
    """
    with head.weight() as weight:
        side = ModelSide(head, hidden, weight, dtype)
        found = [side.weight.new_empty(0, dtype=side.dtype)]
        for index in positions.split(max(1, _LOGITS // side.vocabulary)):
            logits = side.weight.new_empty(len(index), side.vocabulary, dtype=side.dtype)
            side.write_logits(side.operands(index), logits)
            right = logits.gather(1, targets[index].unsqueeze(1)).squeeze(1)
            found.append(right - logits.logsumexp(-1))
    return torch.cat(found)
