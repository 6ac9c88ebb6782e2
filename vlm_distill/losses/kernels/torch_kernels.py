"""The kernels in torch: for CPUs, for float64 on a GPU, and as the reference in tests of the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .forms import ALPHA_BETA_FLOOR, Form, Kind, Source, agree


def accumulate_(form: Form, student: Tensor, teacher: Tensor, targets: Tensor | None, state: Tensor) -> None:
    """Add a tile to the rows' running state, which ``RowStatistics`` describes.

    Args:
        form: the loss.
        student: ``[n, v]`` logits.
        teacher: ``[n, v]``; not read if the target is the student's own distribution.
        targets: int64 ``[n]``, right tokens counted from the tile's first column; only cross-entropy reads them.
        state: ``[n, 9]``.
    """
    x, y = _pair(form, student, teacher)
    top_x, sum_x, top_y, sum_y, forward, reverse, spread, square, right = state.unbind(1)
    if form.kind == Kind.CROSS_ENTROPY:
        assert targets is not None
        inside = (targets >= 0) & (targets < y.shape[1])
        found = y.gather(1, targets.clamp(0, y.shape[1] - 1).unsqueeze(1)).squeeze(1)
        right += torch.where(inside, found, 0.0)
    step_y, y = _advance(top_y, y)
    q, shrink_y = y.exp(), step_y.neg().exp()
    if form.kind == Kind.CROSS_ENTROPY:
        sum_y.mul_(shrink_y).add_(q.sum(-1))
        return
    step_x, x = _advance(top_x, x)
    p, shrink_x = x.exp(), step_x.neg().exp()
    spread.copy_(_carried(shrink_x, spread - sum_x * step_x) + _weighted(p, x))
    gap, shift = x.sub_(y), step_y - step_x
    if form.slope:
        square.copy_(_carried(shrink_x, square + shift * (2.0 * forward + shift * sum_x)) + _weighted(p, gap * gap))
    forward.copy_(_carried(shrink_x, forward + sum_x * shift) + _weighted(p, gap))
    reverse.copy_(_carried(shrink_y, reverse - sum_y * shift) - _weighted(q, gap))
    sum_x.mul_(shrink_x).add_(p.sum(-1))
    sum_y.mul_(shrink_y).add_(q.sum(-1))


def accumulate_mixture_(form: Form, student: Tensor, teacher: Tensor, totals: Tensor) -> None:
    """Add a tile's share of the loss and of the slope to ``totals [n, 6]``, for losses that compare with a mixture."""
    log_p, log_q = _log_probs(form, student, teacher, totals)
    value, slope = _parts(form, log_p, log_q)
    assert value is not None
    totals[:, 4] += value.sum(-1)
    totals[:, 5] += slope.sum(-1)


def gradient_(
    form: Form,
    student: Tensor,
    teacher: Tensor,
    targets: Tensor | None,
    totals: Tensor,
    out: Tensor,
    *,
    scale: float,
    softcap: float | None,
    add: bool,
) -> None:
    """Write the gradient by a tile of the student's logits.

    Args:
        form, student, teacher, targets: as for ``accumulate_``.
        totals: ``[n, 6]``, complete.
        out: receives the gradient ``[n, v]``; may be the student's own memory.
        scale: factor of the gradient.
        softcap: c if the logits are c·tanh(z/c); the gradient is then by z.
        add: whether to add to ``out`` instead of overwriting it.
    """
    if form.kind == Kind.CROSS_ENTROPY:
        assert targets is not None
        gradient = (student - totals[:, 2:3]).sub_(totals[:, 3:4]).exp_()
        gradient -= (torch.arange(out.shape[1], device=out.device) == targets.unsqueeze(1)).to(gradient.dtype)
    else:
        log_p, log_q = _log_probs(form, student, teacher, totals)
        _, slope = _parts(form, log_p, log_q)
        gradient = slope.addcmul_(log_q.exp_(), totals[:, 5:6], value=-1.0)
    gradient.mul_(scale)
    if softcap is not None:
        gradient.mul_(1.0 - (student / softcap).square_())
    if add:
        out.add_(gradient)
    else:
        out.copy_(gradient)


def _pair(form: Form, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's logits x and the student's y, divided by the temperature."""
    y = student
    if form.source == Source.BOTH:
        x = (teacher * form.t).add_(student, alpha=1.0 - form.t)
    else:
        x = student if form.source == Source.STUDENT else teacher
    return (x, y) if form.temperature == 1.0 else (x / form.temperature, y / form.temperature)


def _advance(top: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Raise the running maximum ``top [n]`` to include a tile.

    Returns:
        How far it rose ``[n]`` (0 if everything was −∞ so far: nothing to rescale), and the tile minus the new maximum.
    """
    new = torch.maximum(top, logits.amax(-1))
    step = torch.where(top == -torch.inf, 0.0, new - top)
    top.copy_(new)
    return step, logits - torch.where(new == -torch.inf, 0.0, new).unsqueeze(1)


def _carried(shrink: Tensor, value: Tensor) -> Tensor:
    """Rescale a running sum to the new maximum; 0 once it has shrunk to nothing, even if it was infinite."""
    return torch.where(shrink > 0, shrink * value, 0.0)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Compute Σ weights·values ``[n]``; at weight 0 the value may be infinite, or NaN if both logits are −∞."""
    return torch.where(weights > 0, values, 0.0).mul_(weights).sum(-1)


def _log_probs(form: Form, student: Tensor, teacher: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p and log q of a tile ``[n, v]``."""
    x, y = _pair(form, student, teacher)
    top_x, log_x, top_y, log_y = totals[:, :4].unsqueeze(2).unbind(1)
    return (x - top_x).sub_(log_x), (y - top_y).sub_(log_y)


def _parts(form: Form, log_p: Tensor, log_q: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return each token's share l of the loss and u of the slope: loss = Σl, gradient = u − q·Σu.

    l is ``None`` for losses without a mixture, whose sum is known from the first pass.
    """
    kind, share = form.kind, form.share
    if kind == Kind.FORWARD_KL:
        return None, log_p.exp().neg_()
    q = log_q.exp()
    if kind == Kind.REVERSE_KL:
        return None, _summands(q, log_q - log_p)
    if kind == Kind.ALPHA_BETA:
        return _alpha_beta(form, log_p, log_q)
    p = log_p.exp()
    if kind == Kind.TODI:
        # The value is Σ (q−p) log(q/p), the slope q−p + (1−s) q log(q/p) with s = p/(p+q).
        gap = log_q - log_p
        difference = q - p
        return _summands(difference, gap.clone()), _summands(q, gap.sigmoid().mul_(gap)).add_(difference)
    if kind == Kind.TVD:
        gap = torch.where(agree(p, q), 0.0, q - p)
        return gap.abs().mul_(0.5), gap.sign_().mul_(q).mul_(0.5)
    if kind in (Kind.SKEW_REVERSE_KL, Kind.HELD_SKEW_REVERSE_KL):
        share = 1.0 - share
    mixture = (share * p).add_(q, alpha=1.0 - share).clamp_(min=torch.finfo(p.dtype).tiny)
    log_m = mixture.log()
    if kind == Kind.JSD:
        own = _summands(q, log_q - log_m).mul_(1.0 - share)
        return _summands(p, log_p - log_m).mul_(share).add_(own), own
    ratio = q / mixture
    if kind == Kind.SKEW_FORWARD_KL:
        return _summands(p, log_p - log_m), ratio.mul_(p).mul_(share - 1.0)
    value = _summands(q, log_q - log_m)
    if kind == Kind.HELD_SKEW_REVERSE_KL:
        return value, value
    return value, value - ratio.mul_(q).mul_(1.0 - share)


def _alpha_beta(form: Form, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    a, b = form.share, form.beta
    # A finite limit, so that −∞ in both models gives no NaN; exp still underflows.
    log_p, log_q = log_p.clamp(min=ALPHA_BETA_FLOOR), log_q.clamp(min=ALPHA_BETA_FLOOR)
    mixed = (a * log_p).add_(log_q, alpha=b).exp_()
    theirs = log_p.mul_(a + b).exp_().sub_(mixed)
    own = log_q.mul_(a + b).exp_().sub_(mixed)
    value = theirs.mul_(a / b).add_(own).div_(a * (a + b))
    return value, own.div_(a)


def _summands(weights: Tensor, values: Tensor) -> Tensor:
    """Compute weights·values in the memory of the values; 0 at weight 0."""
    return values.mul_(weights).masked_fill_(weights == 0, 0.0)
