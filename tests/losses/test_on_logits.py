"""Losses from whole logits: equal to the chunked engine behind an identity head, and to autograd of the definitions."""

import pytest
import torch
from torch import nn

from vlm_distill import losses
from vlm_distill.losses import DistillationLoss, HiddenTargets, LossError, Term, fused_linear, on_logits
from vlm_distill.models.lm_head import LMHead

N, C = 7, 11
PARAMS = {
    "taid": {"schedule": "adaptive"},
    "kd": {"temperature": 2.0},
    "dkd": {"temperature": 2.0},
    "ctkd": {"t_range": 2.0, "grl_coefficient": -0.5},
    "ctkd instance": {"t_range": 2.0, "grl_coefficient": -0.5, "instance": True, "width": 5},
    "kd standardised": {"standardise": True, "temperature": 2.0},
    "ctkd standardised": {"standardise": True, "instance": True, "width": 5, "grl_coefficient": -0.5},
}
NAMES = [*losses.available(DistillationLoss), *(name for name in PARAMS if " " in name)]


def make(name):
    torch.manual_seed(3)
    loss = losses.build(name.split()[0], **PARAMS.get(name, {}))
    loss.prepare(C)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.3)
    return loss.double()


def data(dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(n, C, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(C, (n,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), targets


def gradients(total, student, terms):
    learned = [p for term in terms for p in term.loss.parameters()]
    return torch.autograd.grad(total, [student, *learned])


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_definition_and_the_chunked_engine(name):
    terms = [Term("loss", make(name), 0.7)]
    scales = {"loss": 1 / N}
    student, teacher, targets = data()
    sums = on_logits(terms, student, teacher, targets, scales=scales)
    found = gradients(sums.loss, student, terms)

    defined = 0.7 * terms[0].loss(student, teacher, targets).mean()
    torch.testing.assert_close(sums.loss, defined)
    for got, want in zip(found, gradients(defined, student, terms), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)

    identity = nn.Linear(C, C, bias=False, dtype=torch.float64)
    nn.init.eye_(identity.weight)
    head = LMHead(identity)
    chunked = fused_linear(terms, student, head, HiddenTargets(teacher, head), targets, scales=scales)
    torch.testing.assert_close(sums.loss, chunked.loss)
    for got, want in zip(found, gradients(chunked.loss, student, terms), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    mine, other = sums.terms["loss"], chunked.terms["loss"]
    assert (mine.count, set(mine.signals)) == (N, set(terms[0].loss.signals))
    torch.testing.assert_close([mine.loss, *mine.signals.values()], [other.loss, *other.signals.values()])


def test_terms_add_up_with_weights_and_scales_and_the_logits_stay():
    terms = [Term("kd", make("kd"), 2.0), Term("ce", make("cross_entropy"), 0.5), Term("still", make("dkd"), 0.0)]
    student, teacher, targets = data()
    before = student.detach().clone(), teacher.clone()
    sums = on_logits(terms, student, teacher, targets, scales={"kd": 3.0})
    kd, ce = (term.loss(student, teacher, targets).sum() for term in terms[:2])
    torch.testing.assert_close(sums.loss, 6.0 * kd + 0.5 * ce)
    torch.testing.assert_close(
        torch.autograd.grad(sums.loss, student), torch.autograd.grad(6.0 * kd + 0.5 * ce, student)
    )
    assert sums.terms["still"].loss > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precisions_are_raised_and_the_gradient_comes_back_as_the_logits_are(dtype):
    student, teacher, targets = data(dtype)
    terms = [Term("kd", make("kd").float()), Term("ce", make("cross_entropy"))]
    sums = on_logits(terms, student, teacher, targets)
    assert sums.loss.dtype == torch.float32
    leaf = student.detach().double().requires_grad_()
    exact = on_logits([Term(t.name, t.loss.double()) for t in terms], leaf, teacher.double(), targets)
    torch.testing.assert_close(sums.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    sums.loss.backward()
    exact.loss.backward()
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), leaf.grad, rtol=1e-2, atol=1e-2)


def test_no_rows_give_zero_that_hangs_in_the_graph():
    student, teacher, targets = data(n=0)
    term = Term("ctkd", make("ctkd"))
    sums = on_logits([term], student, teacher, targets)
    assert sums.loss.item() == 0.0
    assert sums.terms["ctkd"].count == 0
    assert sums.terms["ctkd"].signals["temperature"].item() == 0.0
    by_student, by_g = torch.autograd.grad(sums.loss, [student, term.loss.source.g])
    assert by_student.shape == (0, C)
    assert by_g.item() == 0.0


def test_evaluation_makes_no_gradient():
    class Strict(DistillationLoss):
        def loss_and_grad(self, student_logits, teacher_logits, targets=None, *, grad):
            assert not grad
            return losses.build("kd").loss_and_grad(student_logits, teacher_logits, targets, grad=grad)

    student, teacher, _ = data()
    with torch.no_grad():
        assert on_logits(Strict(), student, teacher).loss.grad_fn is None
    assert on_logits(Strict(), student.detach(), teacher).loss.grad_fn is None


def test_what_does_not_fit_is_named():
    student, teacher, targets = data()
    kd = make("kd")
    with pytest.raises(ValueError, match="no term"):
        on_logits([], student, teacher)
    with pytest.raises(ValueError, match="share a name"):
        on_logits([Term("a", kd), Term("a", kd)], student, teacher)
    with pytest.raises(ValueError, match="'loss' of the loss needs teacher"):
        on_logits(kd, student)
    with pytest.raises(ValueError, match="'loss' of the loss needs targets"):
        on_logits(make("dkd"), student, teacher)
    with pytest.raises(ValueError, match="has 7 rows, the teacher 6"):
        on_logits(kd, student, teacher[:6])
    with pytest.raises(ValueError, match="has 11 classes, the teacher 10"):
        on_logits(kd, student, teacher[:, :10])
    with pytest.raises(LossError, match="no loss is called"):
        losses.build("dist")
    assert on_logits(make("cross_entropy"), student, None, targets).loss > 0
