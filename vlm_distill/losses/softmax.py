"""Arithmetic that the losses share: softmaxes, entropies and mixtures, safe at −∞.

As in torch, a name that ends in an underscore works in place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def upcast(logits: Tensor | None) -> Tensor:
    """Return the logits in float32 at least: 16-bit ones are converted, float32 and float64 returned as they are."""
    if logits is None:
        raise ValueError("this loss compares with a teacher and was given no teacher logits")
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def need_targets(targets: Tensor | None) -> Tensor:
    """Return the targets; raise ``ValueError`` if there are none."""
    if targets is None:
        raise ValueError("this loss reads the right tokens and was given no targets")
    return targets


class Softmax(NamedTuple):
    """A softmax over the last dimension.

    Attributes:
        log_probs: ``[N, V]``.
        probs: ``[N, V]``.
        log_total: ``[N, 1]``, the logarithm of Σ exp(logit − the row's largest logit).
    """

    log_probs: Tensor
    probs: Tensor
    log_total: Tensor


def softmax_(logits: Tensor) -> Softmax:
    """Compute log-probabilities in the logits' memory and probabilities in a new tensor, with one exponential each."""
    logits.sub_(logits.amax(-1, keepdim=True))
    probs = logits.exp()
    total = probs.sum(-1, keepdim=True)
    log_total = total.log()
    return Softmax(logits.sub_(log_total), probs.div_(total), log_total)


def soften_(student_logits: Tensor, teacher_logits: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Upcast both models' logits and divide them by the temperature, in place if they are float32 or float64."""
    student, teacher = upcast(student_logits), upcast(teacher_logits)
    if temperature != 1.0:
        student.div_(temperature)
        teacher.div_(temperature)
    return student, teacher


def kl_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Compute KL(a‖b) over the last dimension from log-probabilities; differentiable in both.

    Args:
        log_a: ``[N, V]``.
        log_b: ``[N, V]``.

    Returns:
        ``[N]`` nats. Tokens outside the support of a count 0.
    """
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


def relative_entropy_(a: Softmax, b: Softmax) -> tuple[Tensor, Tensor]:
    """Compute KL(a‖b) ``[N]`` and its summands ``a·(log a − log b)`` ``[N, V]``, these in ``a.log_probs``'s memory.

    A summand is 0 outside the support of ``a`` (also if both logits are −∞), and +∞ if only ``b`` is 0.
    """
    # Where a = 0 the difference is −∞ or NaN. A masked fill would cost ten times as much here as nan_to_num, but
    # nan_to_num also hides a NaN among b's logits, which has spread to its whole row: b.log_total brings it back.
    ratio = a.log_probs.sub_(b.log_probs).nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0)
    summands = ratio.mul_(a.probs)
    return summands.sum(-1) + 0.0 * b.log_total.squeeze(-1), summands


class LogitsKL(NamedTuple):
    """KL(p‖q) and what follows from the same sums, ``[N]`` in nats.

    Attributes:
        value: KL(p‖q).
        gradient: ``[N, V]``, its derivative by the logits of q, q − p; ``None`` unless requested.
        entropy: of p; ``None`` unless requested.
    """

    value: Tensor
    gradient: Tensor | None
    entropy: Tensor | None


def kl_of_logits_(x: Tensor, y: Tensor, *, grad: bool, with_entropy: bool = False) -> LogitsKL:
    """Compute KL(p‖q) of p = softmax(x) and q = softmax(y), overwriting both; the gradient takes the place of ``y``.

    The sums are taken before normalising, which saves passes over the logits. With x and y relative to their largest
    entries, KL = Σe^x(x−y)/Σe^x − log Σe^x + log Σe^y, and p's entropy is log Σe^x − Σe^x·x/Σe^x. Summands at −∞ count
    as in ``relative_entropy_``; a NaN reaches its row through Σe^x or Σe^y.
    """
    weights = x.sub_(x.amax(-1, keepdim=True)).exp()
    y.sub_(y.amax(-1, keepdim=True))
    sum_x = weights.sum(-1, keepdim=True)
    log_x = sum_x.log()
    spread = None
    if with_entropy:
        spread = x.clamp(min=torch.finfo(x.dtype).min).mul_(weights).sum(-1, keepdim=True)
    gap = x.sub_(y).nan_to_num_(nan=0.0, posinf=math.inf, neginf=0.0).mul_(weights).sum(-1, keepdim=True)
    y.exp_()
    sum_y = y.sum(-1, keepdim=True)
    value = (gap / sum_x - log_x + sum_y.log()).squeeze(-1)
    entropy_of_p = None if spread is None else (log_x - spread / sum_x).squeeze(-1)
    # Divided one by one, so that equal distributions have a gradient of exactly 0.
    gradient = y.div_(sum_y).sub_(weights.div_(sum_x)) if grad else None
    return LogitsKL(value, gradient, entropy_of_p)


def entropy(log_probs: Tensor, probs: Tensor) -> Tensor:
    """Compute the entropy ``[N]`` in nats of a distribution ``[N, V]``; 0·log 0 is 0."""
    return -log_probs.clamp(min=torch.finfo(log_probs.dtype).min).mul_(probs).sum(-1)


def through_softmax_(slope: Tensor, q: Tensor) -> Tensor:
    """Turn q·dL/dq into dL/dlogits = q·dL/dq − q·Σ q·dL/dq, ``[N, V]``, in the memory of ``slope``."""
    return slope.addcmul_(q, slope.sum(-1, keepdim=True), value=-1.0)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float | Tensor) -> Tensor:
    """Compute log(share·p + (1−share)·q), differentiable; 0 where the mixture underflows, as both summands then do."""
    mixed = share * log_p.exp() + (1.0 - share) * log_q.exp()
    return torch.where(mixed > 0, mixed, 1.0).log()


def mixture(p: Softmax, q: Softmax, share: float | Tensor) -> Tensor:
    """Compute share·p + (1−share)·q in a new tensor, above 0 so that its logarithm is finite; a NaN passes through.

    The share may be a row's own, ``[N, 1]``.
    """
    if isinstance(share, Tensor):
        mixed = (share * p.probs).addcmul_(q.probs, 1.0 - share)
    else:
        mixed = (share * p.probs).add_(q.probs, alpha=1.0 - share)
    return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny)


def kl_summands_(a: Softmax, log_m: Tensor) -> Tensor:
    """Compute a·(log a − log m) for a finite ``log_m``, in the memory of ``a.log_probs``; 0·log 0 is 0."""
    return a.log_probs.clamp_(min=torch.finfo(log_m.dtype).min).sub_(log_m).mul_(a.probs)


def at_targets(rows: Tensor, targets: Tensor) -> Tensor:
    """Return the entry ``[N]`` of each row ``[N, V]`` at its target; differentiable."""
    return rows.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
