"""Diagnostics: what is measured and never trained."""

import math

import pytest
import torch

from vlm_distill import losses


def measure(student, teacher):
    return losses.build("diagnostics").loss_and_grad(student.clone(), teacher.clone(), grad=True)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(6, 50, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_it_pulls_at_nothing(logits):
    result = measure(*logits)
    assert result.grad is None
    assert not result.loss.any()
    assert set(result.signals) == set(losses.build("diagnostics").signals)


def test_by_hand(logits):
    student, teacher = logits
    found = measure(student, teacher).signals
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(found["kl"], (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(found["teacher_entropy"], -(p * p.log()).sum(-1))
    torch.testing.assert_close(found["student_entropy"], -(q * q.log()).sum(-1))
    for row in range(len(p)):
        ranked = p[row].argsort(descending=True)
        assert found["head_mass"][row] == pytest.approx(q[row, ranked[:10]].sum().item())
        assert found["tail_mass"][row] == pytest.approx(q[row, ranked[40:]].sum().item())
    assert found["agreement"].tolist() == [float(a == b) for a, b in zip(p.argmax(-1), q.argmax(-1), strict=True)]
    softened = (teacher / found["temperature"].unsqueeze(-1)).softmax(-1)
    torch.testing.assert_close(-(softened * softened.log()).sum(-1), found["student_entropy"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_a_softened_teacher(temperature, logits):
    _, teacher = logits
    found = measure(teacher / temperature, teacher).signals
    torch.testing.assert_close(found["temperature"], torch.full((6,), temperature).double(), rtol=1e-4, atol=0)
    assert found["agreement"].all()


def test_tokens_outside_the_vocabulary():
    student, teacher = torch.tensor([[1.0, 0.0, -math.inf]]), torch.tensor([[2.0, 0.0, -math.inf]])
    assert all(value.isfinite().all() for value in measure(student, teacher).signals.values())
