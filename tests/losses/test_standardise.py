"""Standardised logits under any loss: the z-score by hand, gradients, invariances, what passes through the wrapper."""

import math

import pytest
import torch
from torch import nn

from vlm_distill import losses
from vlm_distill.losses import DistillationLoss, LossError, Progress, Standardised, Term, fused_linear
from vlm_distill.losses.heads import HiddenTargets
from vlm_distill.models.lm_head import LMHead

WITHOUT = ("uld", "alm", "overlap_kl", "policy_gradient", "cross_entropy", "diagnostics")
COMPARING = [n for n in losses.available(DistillationLoss) if n not in WITHOUT]
HELD = ("taid", "adaptive_kl", "todi")


def logits(n=4, v=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(v, (n,), generator=generator)


def by_hand(row):
    mean = sum(row.tolist()) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row.tolist()) / (len(row) - 1))
    return torch.tensor([(x - mean) / (deviation + 1e-7) for x in row.tolist()], dtype=torch.float64)


def make(name, **params):
    return losses.build(name, standardise=True, **params).double()


@pytest.mark.parametrize("name", COMPARING)
def test_is_the_inner_loss_on_z_scores(name):
    student, teacher, targets = logits()
    z, other = (torch.stack([by_hand(row) for row in x]) for x in (student, teacher))
    torch.testing.assert_close(
        make(name)(student, teacher, targets), losses.build(name).double()(z, other, targets), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("name", COMPARING)
def test_closed_form_equals_definition(name):
    loss = make(name)
    assert loss.kernel_form() is None
    student, teacher, targets = logits(31, 123)
    leaf = student.clone().requires_grad_()
    values = loss(leaf, teacher, targets)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    closed = loss.loss_and_grad(student.clone(), teacher.clone(), targets, grad=True)
    without = loss.loss_and_grad(student.clone(), teacher.clone(), targets, grad=False)
    torch.testing.assert_close(closed.loss, values.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(closed.grad, gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(without.loss, closed.loss)
    assert without.grad is None
    assert set(closed.signals) == set(loss.signals)


@pytest.mark.parametrize("name", [n for n in COMPARING if n not in HELD])
def test_passes_gradcheck(name):
    student, teacher, targets = logits(2, 5)
    assert torch.autograd.gradcheck(lambda s: make(name)(s, teacher, targets), student.requires_grad_())


def test_neither_scale_nor_shift_of_a_row_matters():
    student, teacher, targets = logits()
    loss, scale = make("dkd", temperature=2.0), torch.tensor([[0.1], [1.0], [7.0], [2.0]], dtype=torch.float64)
    plain = loss(student, teacher, targets)
    torch.testing.assert_close(loss(scale * student - 3.0, teacher, targets), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(2.0 * teacher + 1.0, teacher, targets), torch.zeros_like(plain), atol=1e-6, rtol=0)
    gradient = loss.loss_and_grad(student.clone(), teacher.clone(), targets, grad=True).grad
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-13, rtol=0)
    # No first-order change along the logits themselves either: that is a change of scale.
    torch.testing.assert_close((gradient * student).sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_row_of_equal_logits():
    student, teacher, _ = logits()
    student[1] = 2.0
    loss = make("kd")
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, teacher).sum(), leaf)
    closed = loss.loss_and_grad(student.clone(), teacher.clone(), grad=True)
    assert closed.grad.isfinite().all()
    torch.testing.assert_close(closed.grad, gradient, rtol=1e-8, atol=1e-12)


def test_the_inner_losss_own_parts_pass_through():
    taid = losses.build("taid", standardise=True, t_start=0.2, schedule="linear")
    assert (taid.needs, taid.signals) == (frozenset({"teacher"}), ("kl",))
    taid.update({"kl": 1.0}, Progress(step=5, steps=10))
    assert taid.metrics() == {"t": pytest.approx(0.6)}
    other = losses.build("taid", standardise=True, t_start=0.2, schedule="linear")
    other.load_state_dict(taid.state_dict())
    assert other.metrics() == taid.metrics()

    ctkd = losses.build("ctkd", standardise=True, instance=True, width=3)
    ctkd.prepare(9)
    assert {n for n, _ in ctkd.named_parameters()} == {f"inner.source.{n}" for n in ("first", "shift", "last", "g")}
    assert len(ctkd.learned_tensors()) == 4


def test_in_the_chunked_engine():
    student, teacher, targets = logits(7, 11)
    terms = [Term("dkd", make("dkd"), 2.0), Term("ce", losses.build("cross_entropy"))]
    identity = nn.Linear(11, 11, bias=False, dtype=torch.float64)
    nn.init.eye_(identity.weight)
    hidden = student.clone().requires_grad_()
    head = LMHead(identity)
    sums = fused_linear(terms, hidden, head, HiddenTargets(teacher, head), targets, chunk_bytes=1)
    leaf = student.clone().requires_grad_()
    defined = 2.0 * terms[0].loss(leaf, teacher, targets).sum() + terms[1].loss(leaf, None, targets).sum()
    torch.testing.assert_close(sums.loss, defined)
    torch.testing.assert_close(torch.autograd.grad(sums.loss, hidden), torch.autograd.grad(defined, leaf))
    with pytest.raises(ValueError, match="needs whole rows"):
        fused_linear(terms, hidden, head, HiddenTargets(teacher, head), targets, recompute=True)


@pytest.mark.parametrize("name", ["cross_entropy", "uld", "minilm", "hidden_states"])
def test_what_compares_no_logits_class_by_class_refuses_it(name):
    with pytest.raises(LossError, match=f"loss {name}: standardise is for losses that compare"):
        losses.build(name, standardise=True)
    assert not isinstance(losses.build(name, standardise=False), Standardised)


def test_mistakes_are_named():
    with pytest.raises(LossError, match="loss kd: standardise is 1; give true or false"):
        losses.build("kd", standardise=1)
    with pytest.raises(LossError, match=r"no parameter 'temprature' \(did you mean 'temperature'"):
        losses.build("kd", standardise=True, temprature=2.0)
