"""CTKD: a temperature that learns against the student. test_golden compares with the authors' code."""

import pytest
import torch
from torch import nn

from vlm_distill.losses import CTKD, HiddenTargets, Progress, Term, fused_linear
from vlm_distill.models.lm_head import LMHead


@pytest.fixture
def setting():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = nn.Linear(8, 31, bias=False).double(), nn.Linear(11, 31, bias=False).double()
    student.weight.data, teacher.weight.data = random(31, 8), random(31, 11)
    return random(13, 8), student, random(13, 11), teacher


def through_the_engine(loss, setting, chunk_bytes=None, weight=1.0):
    hidden, student, teacher_hidden, teacher = setting
    targets = HiddenTargets(teacher_hidden, LMHead(teacher))
    terms = [Term("ctkd", loss, weight)]
    return fused_linear(terms, hidden, LMHead(student), targets, chunk_bytes=chunk_bytes).loss


@pytest.mark.parametrize("chunk_bytes", [1, 5000, None])
def test_the_engine_gives_g_its_gradient(setting, chunk_bytes):
    hidden, student, teacher_hidden, teacher = setting
    loss = CTKD(grl_coefficient=-0.5, t_range=3.0)
    (got,) = torch.autograd.grad(through_the_engine(loss, setting, chunk_bytes, 0.3), loss.source.g)
    want = torch.autograd.grad(0.3 * loss(student(hidden), teacher(teacher_hidden)).sum(), loss.source.g)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_the_sign_is_reversed_and_the_size_is_the_coefficients(setting):
    hidden, student, teacher_hidden, teacher = setting

    def gradient(coefficient):
        loss = CTKD(grl_coefficient=coefficient, t_range=3.0)
        return torch.autograd.grad(through_the_engine(loss, setting), loss.source.g)[0].item()

    step, values = 1e-3, []
    for g in (1.0 - step, 1.0 + step):
        values.append(CTKD(g=g, t_range=3.0)(student(hidden), teacher(teacher_hidden)).sum().item())
    plain = (values[1] - values[0]) / (2 * step)
    assert gradient(1.0) == pytest.approx(plain, rel=1e-2)
    assert gradient(-1.0) == pytest.approx(-gradient(1.0))
    assert gradient(-0.25) == pytest.approx(-0.25 * gradient(1.0))
    assert gradient(0.0) == 0.0


def test_descent_lowers_the_loss_by_the_student_and_raises_it_by_g(setting):
    _, student, _, _ = setting
    loss = CTKD(grl_coefficient=-1.0, t_range=3.0)
    before = through_the_engine(loss, setting)
    before.backward()
    with torch.no_grad():
        step = 0.05 * loss.source.g.grad.sign()
        loss.source.g -= step
        raised = through_the_engine(loss, setting)
        loss.source.g += step
        student.weight -= 1e-4 * student.weight.grad
        lowered = through_the_engine(loss, setting)
    assert lowered < before < raised


def instance(seed=0, **params):
    """Return a loss with a temperature for each row and a perceptron that is not at its start."""
    loss = CTKD(grl_coefficient=-0.5, t_range=3.0, instance=True, width=5, **params)
    loss.prepare(31)
    generator = torch.Generator().manual_seed(seed)
    for parameter in loss.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return loss


def test_a_temperature_for_each_row(setting):
    hidden, student, teacher_hidden, teacher = setting
    z, y = student(hidden), teacher(teacher_hidden)
    loss = instance()
    g = nn.functional.linear(
        torch.relu(
            nn.functional.linear(torch.cat([z.softmax(-1), y.softmax(-1)], -1), loss.source.first, loss.source.shift)
        ),
        loss.source.last,
        loss.source.g,
    )
    temperature = 1.0 + 3.0 * g.sigmoid()
    p, q = (y / temperature).softmax(-1), (z / temperature).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1, keepdim=True)
    torch.testing.assert_close(loss(z, y), (temperature**2 * kl).squeeze(-1))
    result = loss.loss_and_grad(z.detach().clone(), y.detach().clone(), grad=True)
    torch.testing.assert_close(result.signals["temperature"], temperature.squeeze(-1))
    assert temperature.std() > 0.1


@pytest.mark.parametrize("chunk_bytes", [1, 5000, None])
def test_the_engine_gives_the_perceptron_its_gradient(setting, chunk_bytes):
    hidden, student, teacher_hidden, teacher = setting
    loss = instance()
    inputs = [student.weight, *loss.parameters()]
    got = torch.autograd.grad(through_the_engine(loss, setting, chunk_bytes, 0.3), inputs)
    # The student's weights are pulled as if the temperature were a number.
    want = torch.autograd.grad(0.3 * loss(student(hidden), teacher(teacher_hidden)).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert all(gradient.abs().max() > 0 for gradient in got)


def test_the_perceptron_starts_as_one_temperature_for_all(setting):
    hidden, student, teacher_hidden, teacher = setting
    loss = CTKD(g=0.3, instance=True)
    with pytest.raises(RuntimeError, match="prepare"):
        loss(student(hidden), teacher(teacher_hidden))
    loss.prepare(31)
    want = CTKD(g=0.3)(student(hidden), teacher(teacher_hidden))
    torch.testing.assert_close(loss.double()(student(hidden), teacher(teacher_hidden)), want)


def test_evaluation_makes_no_gradient(setting):
    with torch.no_grad():
        assert not through_the_engine(CTKD(), setting).requires_grad


def test_the_curriculum():
    loss = CTKD(loops=2)
    assert loss.coefficient == 0.0
    found = []
    for epoch in (0.0, 0.5, 1.0, 2.0, 5.0):
        loss.update({}, Progress(0, 10, epoch=epoch))
        found.append(loss.coefficient)
    assert found == pytest.approx([0.0, -0.1464466, -0.5, -1.0, -1.0])
    fixed = CTKD(grl_coefficient=-0.3)
    fixed.update({}, Progress(0, 10, epoch=5.0))
    assert fixed.coefficient == -0.3


def test_the_curriculum_between_other_ends():
    loss = CTKD(loops=8, decay=[0, -0.6])
    loss.update({}, Progress(1, 100, epoch=1.0, epochs=10))
    assert loss.coefficient == pytest.approx(-0.02283614, abs=5e-9)
    loss.update({}, Progress(1, 100, epoch=9.0, epochs=10))
    assert loss.coefficient == -0.6
    assert CTKD(decay=[-0.5, -1]).coefficient == -0.5


def test_state():
    loss, other = CTKD(loops=2), CTKD(loops=2)
    loss.update({}, Progress(0, 10, epoch=1.0))
    loss.source.g.data.fill_(0.4)
    other.load_state_dict(loss.state_dict())
    assert other.coefficient == loss.coefficient == pytest.approx(-0.5)
    assert other.source.g.item() == loss.source.g.item()
    assert loss.source.g.shape == (1,)
