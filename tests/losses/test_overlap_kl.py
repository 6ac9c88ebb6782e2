"""overlap_kl over shared tokens, and GOLD's mixture of it with uld over the others."""

import pytest
import torch
from grouped_tokens import SIZES, GroupedModels, only_groups

from vlm_distill import losses
from vlm_distill.losses import LossError, Term

SHARED = torch.tensor([[0, 3, 4, 9, 17], [5, 2, 30, 11, 0]])
EVERY = torch.tensor([list(range(23)), list(range(8, 31))])
SINGLE = [number for number, (a, b, _) in enumerate(SIZES) if a == b == 1]
DIVERGENCES = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(),
    "jsd": lambda p, q: 0.5 * ((p * (2 * p / (p + q)).log()).sum() + (q * (2 * q / (p + q)).log()).sum()),
    "tvd": lambda p, q: 0.5 * (p - q).abs().sum(),
}


def build(name, shared=SHARED, **params):
    loss = losses.build(name, **params)
    loss.share_tokens(*shared)
    return loss


def categories(logits, ids, temperature, tail):
    probs = (logits / temperature).softmax(-1)
    own = torch.stack([probs[i] for i in ids])
    return torch.cat([own, (1 - own.sum()).reshape(1)]) if tail else own / own.sum()


def by_hand(divergence, student, teacher, groups, shared, temperature, tail):
    values = []
    for number, (ours, theirs) in enumerate(zip(groups.student.tolist(), groups.teacher.tolist(), strict=True)):
        if number not in SINGLE:
            values.append(student.new_zeros(()))
            continue
        q = categories(student[ours[0]], shared[0], temperature, tail)
        p = categories(teacher[theirs[0]], shared[1], temperature, tail)
        values.append(DIVERGENCES[divergence](p, q))
    return torch.stack(values)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("shared", "tail"), [(SHARED, True), (EVERY, False)], ids=["tail", "subset"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_definition_and_closed_form_equal_the_formula(divergence, shared, tail, temperature):
    loss = build("overlap_kl", shared, divergence=divergence, temperature=temperature)
    student, teacher, targets, groups = only_groups(GroupedModels())
    leaf = student.clone().requires_grad_()
    want = by_hand(divergence, leaf, teacher, groups, shared, temperature, tail)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    defined = loss(leaf, teacher, targets, groups)
    torch.testing.assert_close(defined, want, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(defined.sum(), leaf)[0], gradient, rtol=1e-8, atol=1e-13)
    closed = loss.grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    torch.testing.assert_close(closed.loss, want.detach(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(closed.grad, gradient, rtol=1e-8, atol=1e-13)
    assert closed.signals["compared"].nonzero().flatten().tolist() == SINGLE


def test_gradcheck():
    student, teacher, targets, groups = only_groups(GroupedModels())
    loss = build("overlap_kl")
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, targets, groups), student.requires_grad_())


@pytest.mark.parametrize("name", [*DIVERGENCES, "skew_forward_kl", "skew_reverse_kl", "adaptive_kl"])
def test_all_tokens_shared_is_the_divergence_itself(name):
    logits = torch.randn(5, 23, dtype=torch.float64), torch.randn(5, 23, dtype=torch.float64)
    every = torch.arange(23).expand(2, -1)
    own = build("overlap_kl", every, divergence=name).loss_and_grad(*(x.clone() for x in logits), grad=True)
    plain = losses.build(name).loss_and_grad(*(x.clone() for x in logits), grad=True)
    torch.testing.assert_close((own.loss, own.grad), (plain.loss, plain.grad), rtol=1e-10, atol=1e-13)


def gold(student, teacher, shared, weights):
    """Return GOLD's mixture for one row: JSD over shared tokens and the rest, and L1 of the others in order."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    matched = DIVERGENCES["jsd"](categories(teacher, shared[1], 1.0, True), categories(student, shared[0], 1.0, True))
    left = [[x for i, x in enumerate(probs) if i not in ids] for probs, ids in ((q, shared[0]), (p, shared[1]))]
    ours, theirs = (sorted(side, key=torch.Tensor.item, reverse=True) for side in left)
    zero = q.new_zeros(())
    ours, theirs = ours + [zero] * (len(theirs) - len(ours)), theirs + [zero] * (len(ours) - len(theirs))
    unmatched = torch.stack([(a - b).abs() for a, b in zip(ours, theirs, strict=True)]).sum()
    return weights[0] * matched + weights[1] * unmatched


@pytest.mark.parametrize("chunk_bytes", [None, 4_000])
def test_two_terms_make_golds_mixture(chunk_bytes):
    setting = GroupedModels([(1, 1, 0)] * 6)
    weights = 0.7, 0.3
    student, teacher = setting.logits()
    shared = [ids.tolist() for ids in SHARED]
    want = torch.stack([gold(student[row], teacher[row], shared, weights) for row in range(6)]).sum()
    expected = torch.autograd.grad(want, setting.inputs())
    terms = [
        Term("overlap_kl", build("overlap_kl", divergence="jsd"), weights[0]),
        Term("uld", build("uld", tokens="unshared"), weights[1]),
    ]
    got = setting.fused(terms, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(got.loss, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got.loss, setting.inputs()), expected, rtol=1e-8, atol=1e-12)


def test_unshared_tokens_of_groups_have_the_gradient_of_their_definition():
    student, teacher, targets, groups = only_groups(GroupedModels())
    loss = build("uld", tokens="unshared")
    leaf = student.clone().requires_grad_()
    defined = loss(leaf, teacher, targets, groups)
    closed = loss.grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    torch.testing.assert_close(closed.loss, defined.detach(), rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad(defined.sum(), leaf)[0]
    torch.testing.assert_close(closed.grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: losses.build("overlap_kl", divergence="taid"),
            "overlap_kl: divergence is 'taid'.*it must be one of .*forward_kl",
        ),
        (lambda: build("overlap_kl", torch.empty(2, 0, dtype=torch.int64)), "share no token; use uld or alm"),
        (lambda: losses.build("uld", tokens="some"), "tokens is 'some'.*must be one of all, unshared"),
    ],
)
def test_mistakes_are_refused(make, message):
    with pytest.raises(LossError, match=message):
        make()
