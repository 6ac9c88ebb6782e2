"""The kernels in Triton, for float32 logits on a GPU; imported only there or under Triton's interpreter.

In the first two kernels a program streams one row of a tile and carries its statistics; in the third it writes one
block of a row's gradient. Columns beyond the tile count as −∞ in both models, which adds nothing anywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forms import ALPHA_BETA_FLOOR, ROUNDING, Form, Kind

_FORWARD_KL = tl.constexpr(int(Kind.FORWARD_KL))
_REVERSE_KL = tl.constexpr(int(Kind.REVERSE_KL))
_JSD = tl.constexpr(int(Kind.JSD))
_SKEW_FORWARD_KL = tl.constexpr(int(Kind.SKEW_FORWARD_KL))
_SKEW_REVERSE_KL = tl.constexpr(int(Kind.SKEW_REVERSE_KL))
_HELD_SKEW_REVERSE_KL = tl.constexpr(int(Kind.HELD_SKEW_REVERSE_KL))
_ALPHA_BETA = tl.constexpr(int(Kind.ALPHA_BETA))
_TODI = tl.constexpr(int(Kind.TODI))
_TVD = tl.constexpr(int(Kind.TVD))
_CROSS_ENTROPY = tl.constexpr(int(Kind.CROSS_ENTROPY))
_FLOOR = tl.constexpr(ALPHA_BETA_FLOOR)
_STUDENT = tl.constexpr(1)
_BOTH = tl.constexpr(2)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_AGREE = tl.constexpr(ROUNDING * torch.finfo(torch.float32).eps)
_STATE = tl.constexpr(9)
_TOTALS = tl.constexpr(6)

# Columns of a block and warps of a program: each thread holds 16 columns of each model.
BLOCK, WARPS = 4096, 8


def accumulate_(form: Form, student: Tensor, teacher: Tensor, targets: Tensor | None, state: Tensor) -> None:
    """See ``torch_kernels.accumulate_``."""
    rows, columns = student.shape
    _accumulate[(rows,)](
        student,
        teacher,
        state if targets is None else targets,
        state,
        columns,
        student.stride(0),
        teacher.stride(0),
        form.t,
        1.0 / form.temperature,
        KIND=int(form.kind),
        SOURCE=int(form.source),
        SLOPE=form.slope,
        BLOCK=_block(columns),
        num_warps=WARPS,
    )


def accumulate_mixture_(form: Form, student: Tensor, teacher: Tensor, totals: Tensor) -> None:
    """See ``torch_kernels.accumulate_mixture_``."""
    rows, columns = student.shape
    _accumulate_mixture[(rows,)](
        student,
        teacher,
        totals,
        columns,
        student.stride(0),
        teacher.stride(0),
        form.t,
        1.0 / form.temperature,
        form.share,
        form.beta,
        KIND=int(form.kind),
        SOURCE=int(form.source),
        BLOCK=_block(columns),
        num_warps=WARPS,
    )


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
    """See ``torch_kernels.gradient_``."""
    rows, columns = student.shape
    block = _block(columns)
    _gradient[(rows, triton.cdiv(columns, block))](
        student,
        teacher,
        totals if targets is None else targets,
        totals,
        out,
        columns,
        student.stride(0),
        teacher.stride(0),
        out.stride(0),
        form.t,
        1.0 / form.temperature,
        form.share,
        form.beta,
        scale,
        1.0 if softcap is None else 1.0 / softcap,
        KIND=int(form.kind),
        SOURCE=int(form.source),
        CAPPED=softcap is not None,
        ADD=add,
        BLOCK=block,
        num_warps=WARPS,
    )


def _block(columns: int) -> int:
    return min(BLOCK, max(128, triton.next_power_of_2(columns)))


@triton.jit
def _pair(s, teacher_row, cols, inside, t, inverse, SOURCE: tl.constexpr):
    """Return the target's and the student's logits of a block, divided by the temperature."""
    if SOURCE == _STUDENT:
        x = s
    else:
        x = tl.load(teacher_row + cols, mask=inside, other=-float("inf"))
        if SOURCE == _BOTH:
            x = t * x + (1.0 - t) * s
    return x * inverse, s * inverse


@triton.jit
def _weighted(weights, values):
    return tl.sum(tl.where(weights > 0, weights * values, 0.0), axis=0)


@triton.jit
def _carried(shrink, value):
    return tl.where(shrink > 0, shrink * value, 0.0)


@triton.jit
def _shift(values, top):
    """Return the values less the maximum so far, that maximum, its rise, and the factor that earlier sums shrink by."""
    new = tl.maximum(top, tl.max(values, axis=0))
    step = tl.where(top == -float("inf"), 0.0, new - top)
    return values - tl.where(new == -float("inf"), 0.0, new), new, step, tl.exp(-step)


@triton.jit
def _accumulate(
    student,
    teacher,
    targets,
    state,
    columns,
    student_stride,
    teacher_stride,
    t,
    inverse,
    KIND: tl.constexpr,
    SOURCE: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_row = student + row * student_stride
    teacher_row = teacher + row * teacher_stride
    slots = state + row * _STATE
    top_x = tl.load(slots)
    sum_x = tl.load(slots + 1)
    top_y = tl.load(slots + 2)
    sum_y = tl.load(slots + 3)
    forward = tl.load(slots + 4)
    reverse = tl.load(slots + 5)
    spread = tl.load(slots + 6)
    square = tl.load(slots + 7)
    right = tl.load(slots + 8)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < columns
        s = tl.load(student_row + cols, mask=inside, other=-float("inf"))
        x, y = _pair(s, teacher_row, cols, inside, t, inverse, SOURCE)
        if KIND == _CROSS_ENTROPY:
            right += tl.sum(tl.where(inside & (cols == tl.load(targets + row)), y, 0.0), axis=0)
        y, top_y, step_y, shrink_y = _shift(y, top_y)
        q = tl.exp(y)
        if KIND != _CROSS_ENTROPY:
            x, top_x, step_x, shrink_x = _shift(x, top_x)
            p = tl.exp(x)
            gap = x - y
            shift = step_y - step_x
            spread = _carried(shrink_x, spread - sum_x * step_x) + _weighted(p, x)
            if SLOPE:
                square = _carried(shrink_x, square + shift * (2.0 * forward + shift * sum_x)) + _weighted(p, gap * gap)
            forward = _carried(shrink_x, forward + sum_x * shift) + _weighted(p, gap)
            reverse = _carried(shrink_y, reverse - sum_y * shift) - _weighted(q, gap)
            sum_x = sum_x * shrink_x + tl.sum(p, axis=0)
        sum_y = sum_y * shrink_y + tl.sum(q, axis=0)
    tl.store(slots, top_x)
    tl.store(slots + 1, sum_x)
    tl.store(slots + 2, top_y)
    tl.store(slots + 3, sum_y)
    tl.store(slots + 4, forward)
    tl.store(slots + 5, reverse)
    tl.store(slots + 6, spread)
    tl.store(slots + 7, square)
    tl.store(slots + 8, right)


@triton.jit
def _summands(weights, values):
    return tl.where(weights == 0, 0.0, weights * values)


@triton.jit
def _positive(mixture):
    # A comparison and not tl.maximum, which drops a NaN.
    return tl.where(mixture < _TINY, _TINY, mixture)


@triton.jit
def _parts(log_p, log_q, share, beta, KIND: tl.constexpr):
    """See ``torch_kernels._parts``; here l is always computed, and the compiler drops it where nothing reads it."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    value = p
    slope = -p
    if KIND == _REVERSE_KL:
        value = _summands(q, log_q - log_p)
        slope = value
    elif KIND == _TVD:
        gap = tl.where(tl.abs(q - p) <= tl.where(p > q, p, q) * _AGREE, 0.0, q - p)
        value = 0.5 * tl.abs(gap)
        slope = tl.where(gap > 0, 0.5 * q, tl.where(gap < 0, -0.5 * q, 0.0))
    elif KIND == _JSD:
        log_m = tl.log(_positive(share * p + (1.0 - share) * q))
        slope = (1.0 - share) * _summands(q, log_q - log_m)
        value = share * _summands(p, log_p - log_m) + slope
    elif KIND == _SKEW_FORWARD_KL:
        mixture = _positive(share * p + (1.0 - share) * q)
        value = _summands(p, log_p - tl.log(mixture))
        slope = (share - 1.0) * p * (q / mixture)
    elif KIND == _SKEW_REVERSE_KL:
        mixture = _positive((1.0 - share) * p + share * q)
        value = _summands(q, log_q - tl.log(mixture))
        slope = value - share * q * (q / mixture)
    elif KIND == _HELD_SKEW_REVERSE_KL:
        mixture = _positive((1.0 - share) * p + share * q)
        value = _summands(q, log_q - tl.log(mixture))
        slope = value
    elif KIND == _ALPHA_BETA:
        # A comparison and not tl.maximum, which drops a NaN.
        x = tl.where(log_p < _FLOOR, _FLOOR, log_p)
        y = tl.where(log_q < _FLOOR, _FLOOR, log_q)
        total = share + beta
        mixed = tl.exp(share * x + beta * y)
        own = tl.exp(total * y) - mixed
        value = (own + share / beta * (tl.exp(total * x) - mixed)) / (share * total)
        slope = own / share
    elif KIND == _TODI:
        gap = log_q - log_p
        value = _summands(q - p, gap)
        slope = q - p + _summands(q, gap / (1.0 + tl.exp(-gap)))
    return value, slope, q


@triton.jit
def _log_probs(s, teacher_row, cols, inside, slots, t, inverse, SOURCE: tl.constexpr):
    x, y = _pair(s, teacher_row, cols, inside, t, inverse, SOURCE)
    log_p = (x - tl.load(slots)) - tl.load(slots + 1)
    log_q = (y - tl.load(slots + 2)) - tl.load(slots + 3)
    return log_p, log_q


@triton.jit
def _accumulate_mixture(
    student,
    teacher,
    totals,
    columns,
    student_stride,
    teacher_stride,
    t,
    inverse,
    share,
    beta,
    KIND: tl.constexpr,
    SOURCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_row = student + row * student_stride
    teacher_row = teacher + row * teacher_stride
    slots = totals + row * _TOTALS
    loss = tl.load(slots + 4)
    slope = tl.load(slots + 5)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < columns
        s = tl.load(student_row + cols, mask=inside, other=-float("inf"))
        log_p, log_q = _log_probs(s, teacher_row, cols, inside, slots, t, inverse, SOURCE)
        l, u, _ = _parts(log_p, log_q, share, beta, KIND)
        loss += tl.sum(l, axis=0)
        slope += tl.sum(u, axis=0)
    tl.store(slots + 4, loss)
    tl.store(slots + 5, slope)


@triton.jit
def _gradient(
    student,
    teacher,
    targets,
    totals,
    out,
    columns,
    student_stride,
    teacher_stride,
    out_stride,
    t,
    inverse,
    share,
    beta,
    scale,
    inverse_cap,
    KIND: tl.constexpr,
    SOURCE: tl.constexpr,
    CAPPED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = totals + row * _TOTALS
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    s = tl.load(student + row * student_stride + cols, mask=inside, other=-float("inf"))
    log_p, log_q = _log_probs(s, teacher + row * teacher_stride, cols, inside, slots, t, inverse, SOURCE)
    if KIND == _CROSS_ENTROPY:
        gradient = tl.exp(log_q) - tl.where(cols == tl.load(targets + row), 1.0, 0.0)
    else:
        _, u, q = _parts(log_p, log_q, share, beta, KIND)
        gradient = u - q * tl.load(slots + 5)
    gradient = scale * gradient
    if CAPPED:
        gradient = gradient * (1.0 - (s * inverse_cap) * (s * inverse_cap))
    where = out + row * out_stride + cols
    if ADD:
        gradient += tl.load(where, mask=inside, other=0.0)
    tl.store(where, gradient.to(out.dtype.element_ty), mask=inside)
