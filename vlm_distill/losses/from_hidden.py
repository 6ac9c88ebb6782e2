"""A weighted sum of losses straight from hidden states; the logits exist for a few positions at a time.

The gradients by the hidden states, the head's weight and its bias are computed in the forward pass (Liger Kernel's
scheme: three matrix products for the student and one for the teacher, none repeated); the backward pass only scales
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DistillationLoss, Term
from .chunks import Chunks
from .fused_sums import FusedSums
from .groups import TokenGroups
from .heads import Head, HiddenTargets, MixedSide, MixedTargets, ModelSide
from .softmax import need_targets
from .sums import LossSums, check_same, check_terms, with_gradients
from .tiles import Tiles
from .token_targets import TokenTargets
from .topk import TopKTargets

#: A teacher's outputs.
Targets = HiddenTargets | MixedTargets | TopKTargets | TokenTargets


@dataclass(frozen=True)
class _Settings:
    """The options of one call, as ``fused_linear`` describes them."""

    distilled: Tensor | TokenGroups | None
    scales: Mapping[str, float]
    chunk_bytes: int | None
    recompute: bool

    @property
    def groups(self) -> TokenGroups | None:
        """``distilled`` where tokenizers differ."""
        return self.distilled if isinstance(self.distilled, TokenGroups) else None


# Loops over chunks and sums in place gain nothing from torch.compile, and its default backend gets them wrong.
@torch.compiler.disable
def fused_linear(
    terms: Sequence[Term] | DistillationLoss,
    student_hidden: Tensor,
    student_head: Head,
    teacher: Targets | None = None,
    targets: Tensor | None = None,
    *,
    distilled: Tensor | TokenGroups | None = None,
    scales: Mapping[str, float] | None = None,
    chunk_bytes: int | None = None,
    recompute: bool = False,
) -> LossSums:
    """Compute sums of losses over positions, and their gradient.

    Logits and gradients are float32 (float64 if the student's hidden states are); a gradient is cast to its parameter's
    dtype once. On a GPU, bfloat16 matrix products write float32; other 16-bit weights are converted as a whole first,
    in memory beyond ``chunk_bytes``. Nothing is computed for gradients that are switched off or not needed.

    Args:
        terms: the summands; a single loss becomes a term called "loss".
        student_hidden: ``[N, H]``, at the positions that predict supervised tokens; N may be 0.
        student_head: its weight's context stays open during the call.
        teacher: hidden states at the same N positions and their head, those of several teachers to be mixed, or the
            likeliest tokens there, or the log-probabilities of the tokens to predict; optional if no term needs it.
        targets: int64 ``[N]``, the tokens to predict; optional if no term needs them.
        distilled: which positions the terms with a teacher see: bool ``[N]`` (default: all), or, where tokenizers
            differ, groups of the student's N and the teacher's M positions. Other terms see every position.
        scales: a factor for each term's sum, by name; 1 for the others.
        chunk_bytes: limit of all ``[rows, V]`` buffers together, exceeded only if one row or group needs more. Default:
            128 MiB on a CPU, 1 GiB elsewhere; with ``recompute`` 4 MiB and 1 GiB.
        recompute: form the logits in tiles of positions × vocabulary, once for the losses and once for the gradient, so
            that memory besides the gradients depends on neither. Costs two more products, four for losses that compare
            with a mixture; only for losses with a ``kernel_form``, and only for teachers that give hidden states.

    Returns:
        ``loss`` = Σ over terms of weight · scale · sum over positions. It belongs to the graph even if N is 0, so that
        head and hidden states receive (zero) gradients. There are no second derivatives.

    Raises:
        ValueError: no terms, two with one name, or a term that needs what was not given; or the models differ in
            positions or vocabulary.
    """
    if isinstance(terms, DistillationLoss):
        terms = [Term("loss", terms)]
    settings = _Settings(distilled, scales or {}, chunk_bytes, recompute)
    _check(terms, teacher, targets, settings.groups, recompute)
    if not any(term.has_teacher for term in terms):
        teacher = None
    return _compute(terms, student_hidden, student_head, teacher, targets, settings)


def _compute(
    terms: Sequence[Term],
    student_hidden: Tensor,
    student_head: Head,
    teacher: Targets | None,
    targets: Tensor | None,
    settings: _Settings,
) -> LossSums:
    recording = torch.is_grad_enabled()
    with (
        torch.autocast(student_hidden.device.type, enabled=False),
        student_head.weight() as weight,
        ExitStack() as heads,
    ):
        learned = {term.name: term.loss.learned_tensors() for term in terms}
        inputs = [student_hidden, weight, student_head.bias]
        for tensors in learned.values():
            inputs.extend(tensors)
        wanted = [recording and x is not None and x.requires_grad for x in inputs]
        with torch.no_grad():
            student = ModelSide(student_head, student_hidden, weight, student_hidden.dtype)
            other = _open(teacher, student.dtype, heads)
            _check_sizes(terms, student, other, grouped=settings.groups is not None)
            work = FusedSums(terms, settings.scales, student, other, targets, wanted, settings.chunk_bytes)
            work.expect_learned(learned, student.dtype)
            _run(work, settings)
            total = work.total()
            made = [work.d_hidden, work.d_weight, work.d_bias, *work.learned_gradients()]
        if any(wanted):
            total = with_gradients(total, made, inputs)
    return LossSums(total, work.sums)


def _open(
    teacher: Targets | None, dtype: torch.dtype, heads: ExitStack
) -> ModelSide | TopKTargets | TokenTargets | None:
    """Return a teacher's side of the comparison, with the contexts of its heads open as long as ``heads``."""
    if isinstance(teacher, MixedTargets):
        return MixedSide([_side(part, dtype, heads) for part in teacher.parts], teacher.weights, teacher.combine)
    return _side(teacher, dtype, heads) if isinstance(teacher, HiddenTargets) else teacher


def _side(targets: HiddenTargets, dtype: torch.dtype, heads: ExitStack) -> ModelSide:
    return ModelSide(targets.head, targets.hidden, heads.enter_context(targets.head.weight()), dtype)


def _run(work: FusedSums, settings: _Settings) -> None:
    """Add every term on the positions that it sees, in tiles or in chunks of whole rows."""
    everywhere = torch.arange(len(work.student), device=work.student.hidden.device)
    distilled = settings.distilled
    parts: list[tuple[Sequence[Term], Tensor]] = []
    for alike in _with_the_same_weights(work.terms):
        if distilled is None or not any(term.has_teacher for term in alike):
            parts.append((alike, everywhere))
            continue
        if isinstance(distilled, TokenGroups):
            seen = Chunks(work, alike).run_groups(distilled)
        else:
            seen = distilled
            parts.append((alike, everywhere[seen]))
        parts.append(([term for term in alike if not term.has_teacher], everywhere[~seen]))
    for terms, positions in parts:
        if not terms or not len(positions):
            continue
        if settings.recompute or _tiles_are_faster(work, terms):
            Tiles(work, terms, len(positions), recompute=settings.recompute).run(positions)
        else:
            Chunks(work, terms).run(positions)


def _with_the_same_weights(terms: Sequence[Term]) -> list[list[Term]]:
    """Put terms together that share the weights of their rows; the logits are formed once for each such list."""
    alike: dict[int, list[Term]] = {}
    for term in terms:
        alike.setdefault(id(term.row_weights), []).append(term)
    return list(alike.values())


def _tiles_are_faster(work: FusedSums, terms: Sequence[Term]) -> bool:
    """Return whether to use the kernels: on a GPU if they know every loss. A CPU is faster in blocks of whole rows."""
    known = all(term.loss.kernel_form() is not None for term in terms)
    return known and not work.on_cpu and not isinstance(work.teacher, TopKTargets)


def _check(
    terms: Sequence[Term],
    teacher: Targets | None,
    targets: Tensor | None,
    groups: TokenGroups | None,
    recompute: bool,
) -> None:
    """Raise ``ValueError`` if a term needs what was not given."""
    check_terms(terms, teacher=teacher, targets=targets)
    for term in terms:
        if isinstance(teacher, TopKTargets) and term.has_teacher and not term.loss.takes_topk:
            raise ValueError(
                f"term {term.name!r} of the loss needs the teacher's whole distribution, not its top tokens"
            )
        if isinstance(teacher, TokenTargets) and term.has_teacher:
            if not term.loss.takes_tokens:
                raise ValueError(
                    f"term {term.name!r} of the loss needs more of the teacher than a token's log-probability"
                )
            need_targets(targets)
        if groups is not None and term.has_teacher:
            if not term.loss.takes_groups:
                raise ValueError(f"term {term.name!r} of the loss compares token by token, and groups were given")
            need_targets(targets)
        if recompute and term.loss.kernel_form() is None:
            raise ValueError(f"term {term.name!r} of the loss needs whole rows of logits, which recompute never forms")
    if recompute and isinstance(teacher, TopKTargets):
        raise ValueError("recompute needs the teacher's hidden states, not its top tokens")
    if recompute and isinstance(teacher, MixedTargets) and teacher.combine == "probabilities":
        raise ValueError("recompute never forms whole rows of logits, which a mean of probabilities needs")


def _check_sizes(
    terms: Sequence[Term], student: ModelSide, teacher: ModelSide | TopKTargets | TokenTargets | None, *, grouped: bool
) -> None:
    """Raise ``ValueError`` if the models cannot be compared row by row."""
    if isinstance(teacher, TopKTargets):
        check_same("rows", len(student), len(teacher.ids))
    elif isinstance(teacher, TokenTargets):
        if not grouped:
            check_same("rows", len(student), len(teacher))
    elif teacher is not None:
        if not grouped:
            check_same("rows", len(student), len(teacher))
        if not all(term.loss.takes_groups for term in terms if term.has_teacher):
            check_same("tokens in the vocabulary", student.vocabulary, teacher.vocabulary)
