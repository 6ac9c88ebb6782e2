"""The policy gradient: on average over the student's tokens, the reverse KL and its gradient."""

import pytest
import torch
from torch import nn

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, LossError, Progress, Term, TokenTargets, fused_linear
from vlm_distill.models.lm_head import LMHead

V = 7


def logits(rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(rows, V, generator=generator, dtype=torch.float64) for _ in range(2)]


def expected(values, student):
    """The mean over tokens that the student draws, of values for every token, ``[V, …, V]`` or ``[V, …]``."""
    q = student.softmax(-1).T
    return (values * q.reshape(q.shape + (1,) * (values.ndim - 2))).sum(0)


def every_token(loss, student, teacher):
    """The results if each token of the vocabulary is drawn in all rows."""
    found = []
    for token in range(V):
        drawn = torch.full((len(student),), token)
        found.append(loss.loss_and_grad(student.clone(), teacher.clone(), drawn, grad=True))
    return found


def test_it_is_the_reverse_kl_on_average():
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    exact = losses.build("reverse_kl")(leaf, teacher)
    (gradient,) = torch.autograd.grad(exact.sum(), leaf)
    found = every_token(losses.build("policy_gradient"), student, teacher)
    torch.testing.assert_close(expected(torch.stack([one.loss for one in found]), student), exact.detach())
    torch.testing.assert_close(expected(torch.stack([one.grad for one in found]), student), gradient)
    k3 = torch.stack([one.signals["k3"] for one in found])
    torch.testing.assert_close(expected(k3, student), exact.detach())
    assert bool((k3 >= 0).all())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_definition_and_closed_form_equal_the_formula(clip):
    student, teacher = logits()
    drawn, loss = torch.tensor([0, 3, 6, 3, 1]), losses.build("policy_gradient", clip=clip)
    q, rows = student.softmax(-1), torch.arange(5)
    distance = (q / teacher.softmax(-1)).log()[rows, drawn]
    slope = distance if clip is None else distance.clamp(-clip, clip)
    gradient = slope.unsqueeze(-1) * (nn.functional.one_hot(drawn, V) - q)
    leaf = student.clone().requires_grad_()
    defined = loss(leaf, teacher, drawn)
    torch.testing.assert_close(defined.detach(), distance)
    torch.testing.assert_close(torch.autograd.grad(defined.sum(), leaf)[0], gradient)
    closed = loss.loss_and_grad(student.clone(), teacher.clone(), drawn, grad=True)
    torch.testing.assert_close(closed.loss, distance)
    torch.testing.assert_close(closed.grad, gradient)
    torch.testing.assert_close(closed.grad.sum(-1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(closed.signals["k2"], distance**2 / 2)
    assert loss.loss_and_grad(student, teacher, drawn, grad=False).grad is None


def test_one_log_probability_a_token_is_enough():
    torch.manual_seed(0)
    heads = [LMHead(nn.Linear(4, V, bias=False).double()) for _ in range(2)]
    hidden = [torch.randn(6, 4, dtype=torch.float64) for _ in range(2)]
    drawn = torch.randint(V, (6,))
    own = TokenTargets(heads[1].logits(hidden[1]).double().log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1))
    results = []
    for teacher in (HiddenTargets(hidden[1], heads[1]), own):
        leaf = hidden[0].clone().requires_grad_()
        term = Term("own", losses.build("policy_gradient"))
        sums = fused_linear([term], leaf, heads[0], teacher, drawn)
        results.append((sums, torch.autograd.grad(sums.loss, leaf)[0]))
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    assert results[1][0].terms["own"].signals.keys() == {"k2", "k3"}


def test_its_diagnostics_are_logged_and_mistakes_told():
    loss = losses.build("policy_gradient")
    assert loss.metrics() == {}
    loss.update({"k2": 0.5, "k3": 0.25}, Progress(0, 10))
    assert loss.metrics() == {"k2": 0.5, "k3": 0.25}
    with pytest.raises(LossError, match="loss policy_gradient: clip is 0"):
        losses.build("policy_gradient", clip=0)
