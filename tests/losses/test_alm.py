"""ALM: binary distributions of the same text, against a definition written apart and with teachers of every kind."""

import math

import pytest
import torch
from grouped_tokens import SIZES, GroupedModels, make_groups, only_groups

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, LossError, Term, TokenTargets, fused_linear

FORMS = [
    ({}, "binary_cross_entropy"),
    ({"tau": 1.0}, "binary_cross_entropy"),
    ({"tau": math.inf}, "limit"),
    ({"tau": 1, "distance": "reverse_binary_kl"}, "reverse_binary_kl"),
    ({"tau": 3.0, "distance": "absolute"}, "absolute"),
]


def text_log_probs(logits, targets, spans):
    """Return the log-probability of each group's text, token by token."""
    found = []
    for first, stop in spans.tolist():
        rows = [logits[row].softmax(-1)[targets[row]].log() for row in range(first, stop)]
        found.append(torch.stack(rows).sum())
    return torch.stack(found)


def distance_by_hand(kind, t, s):
    """Return the distance of two log-probabilities of an event, as the paper's code has it."""
    if kind == "limit":
        return (t - s) + t * torch.log(-s) - t * torch.log(-t)
    p, q = t.exp(), s.exp()
    if kind == "absolute":
        return (p - q).abs()
    if kind == "reverse_binary_kl":
        return q * (q.log() - p.log()) + (1 - q) * ((1 - q).log() - (1 - p).log())
    return -(p * s + (1 - p) * torch.log(1 - q))


def by_hand(params, kind, student, teacher):
    tau = params.get("tau", 100.0)
    divisor = 1.0 if tau == math.inf else tau
    t, s = (x.clamp(max=0.0) / divisor - 1e-6 for x in (teacher, student))
    return torch.stack([distance_by_hand(kind, a, b) for a, b in zip(t, s, strict=True)])


@pytest.mark.parametrize(("params", "kind"), FORMS)
def test_definition_and_closed_form_equal_the_formula(params, kind):
    loss = losses.build("alm", **params)
    student, teacher, targets, groups = only_groups(GroupedModels())
    leaf = student.clone().requires_grad_()
    own = text_log_probs(leaf, targets, groups.student)
    other = text_log_probs(teacher, groups.teacher_targets, groups.teacher)
    want = by_hand(params, kind, own, other)
    (gradient,) = torch.autograd.grad(want.sum(), leaf, retain_graph=True)
    defined = loss(leaf, teacher, targets, groups)
    torch.testing.assert_close(defined, want, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(defined.sum(), leaf)[0], gradient, rtol=1e-8, atol=1e-14)
    closed = loss.grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    without = loss.grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=False)
    torch.testing.assert_close(closed.loss, want.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(closed.grad, gradient, rtol=1e-8, atol=1e-14)
    assert without.grad is None
    assert torch.equal(without.loss, closed.loss)


@pytest.mark.parametrize(("params", "kind"), FORMS)
def test_gradcheck(params, kind):
    student, teacher, targets, groups = only_groups(GroupedModels())
    loss = losses.build("alm", **params)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, targets, groups), student.requires_grad_())


def test_a_token_is_its_own_group_if_tokenizers_are_equal():
    setting = GroupedModels([(1, 1, 0)] * 9, 23, 23)
    student, teacher = (x.detach()[:9] for x in setting.logits())
    targets = setting.targets[:9]
    loss = losses.build("alm", tau=2.0)
    plain = loss.loss_and_grad(student.clone(), teacher.clone(), targets, grad=True)
    groups = make_groups([(1, 1, 0)] * 9, targets)
    grouped = loss.grouped_loss_and_grad(student.clone(), teacher.clone(), targets, groups, grad=True)
    assert torch.equal(plain.loss, grouped.loss)
    assert torch.equal(plain.grad, grouped.grad)


def test_the_limit_is_tau_times_the_binary_kl():
    student, teacher = torch.tensor([-0.2, -3.0, -9.0]).double(), torch.tensor([-0.1, -4.0, -2.0]).double()
    tau = 1e7
    far = losses.build("alm", tau=tau)
    far_kl = tau * (far.compare(teacher, student) - far.compare(teacher, teacher))
    # The margin of 1e-6 is not divided by τ: leave it out of this comparison.
    t, s = teacher / tau, student / tau
    kl = t.exp() * (t - s) + -torch.expm1(t) * (torch.log(-torch.expm1(t)) - torch.log(-torch.expm1(s)))
    limit = losses.build("alm", tau=math.inf).compare(teacher, student)
    torch.testing.assert_close(limit, tau * kl, rtol=1e-4, atol=1e-6)
    assert (limit > 0).all()
    assert torch.isfinite(far_kl).all()


@pytest.mark.parametrize(("params", "kind"), FORMS)
def test_the_gradient_is_zero_at_equal_texts_and_extremes_stay_finite(params, kind):
    loss = losses.build("alm", **params)
    logits = torch.tensor([[40.0, -40.0, 0.0], [0.0, 1.0, 2.0], [-200.0, 0.0, 0.0]])
    same = loss.loss_and_grad(logits.clone(), logits.clone(), torch.tensor([0, 1, 0]), grad=True)
    other = loss.loss_and_grad(logits.clone(), -logits, torch.tensor([0, 1, 0]), grad=True)
    assert same.grad.abs().max() < 1e-5
    assert torch.isfinite(other.loss).all()
    assert torch.isfinite(other.grad).all()
    torch.testing.assert_close(other.grad.sum(-1), torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [None, 4_000])
@pytest.mark.parametrize("grouped", [True, False])
def test_one_number_a_token_gives_what_hidden_states_give(grouped, chunk_bytes):
    setting = GroupedModels() if grouped else GroupedModels([(1, 1, 0)] * 9, 23, 23)
    count = len(setting.targets)
    teacher = (
        setting.teacher if grouped else HiddenTargets(setting.teacher.hidden.repeat(2, 1)[:count], setting.teacher.head)
    )
    targets = setting.groups.teacher_targets if grouped else setting.targets
    logits = teacher.head._linear(teacher.hidden).detach()
    known = TokenTargets(logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    terms = [Term("alm", losses.build("alm")), Term("data", losses.build("cross_entropy"), 0.3)]
    distilled = setting.groups if grouped else torch.arange(count) % 3 != 0
    found = []
    for targets_of in (teacher, known):
        result = fused_linear(
            terms,
            setting.hidden,
            setting.head,
            targets_of,
            setting.targets,
            distilled=distilled,
            chunk_bytes=chunk_bytes,
        )
        found.append((result.loss, *torch.autograd.grad(result.loss, setting.inputs())))
        assert result.terms["alm"].count == (len(SIZES) if grouped else int(distilled.sum()))
        assert result.terms["data"].count == count
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_other_losses_refuse_one_number_a_token():
    setting = GroupedModels([(1, 1, 0)] * 9, 23, 23)
    known = TokenTargets(torch.zeros(len(setting.targets)))
    with pytest.raises(ValueError, match="needs more of the teacher than a token's log-probability"):
        fused_linear(losses.build("forward_kl"), setting.hidden, setting.head, known, setting.targets)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"tau": 0}, "loss alm: tau is 0; give a number above 0"),
        ({"tau": math.inf, "distance": "absolute"}, "loss alm: tau is inf"),
        ({"distance": "absolut"}, "did you mean 'absolute'"),
    ],
)
def test_wrong_parameters_are_refused(params, message):
    with pytest.raises(LossError, match=message):
        losses.build("alm", **params)
