"""Vision relation: its definition, its gradient, and what it ignores."""

import torch

from vlm_distill import losses

SAMPLES = torch.tensor([0, 0, 0, 2, 2])


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(student, teacher, samples=SAMPLES):
    loss = losses.build("vision_relation")
    return loss({"image_hidden": student}, {"image_hidden": teacher}, samples)


def test_it_is_one_minus_the_cosine_of_the_similarities():
    student, teacher = draw(5, 4, seed=1), draw(5, 7, seed=2)
    expected = []
    for rows in ([0, 1, 2], [3, 4]):
        dot = mine = theirs = 0.0
        for i in rows:
            for j in rows:
                s, t = student[i] @ student[j], teacher[i] @ teacher[j]
                dot, mine, theirs = dot + s * t, mine + s * s, theirs + t * t
        expected.append(1 - dot / (mine * theirs).sqrt())
    torch.testing.assert_close(value(student, teacher), torch.stack(expected))


def test_its_gradient_is_right_and_reaches_the_student_alone():
    student, teacher = draw(5, 4, seed=1).requires_grad_(), draw(5, 3, seed=2)
    assert torch.autograd.gradcheck(lambda x: value(x, teacher), student)


def test_rotating_and_scaling_a_model_changes_nothing():
    student, teacher = draw(5, 4, seed=1), draw(5, 4, seed=2)
    rotation = torch.linalg.qr(draw(4, 4, seed=3)).Q
    torch.testing.assert_close(value(3 * student @ rotation, teacher), value(student, teacher))
    assert value(3 * teacher @ rotation, teacher).abs().max() < 1e-12


def test_without_image_tokens_it_is_empty_and_in_the_graph():
    student = torch.zeros(0, 4, requires_grad=True)
    found = value(student, torch.zeros(0, 3), SAMPLES[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert student.grad.shape == (0, 4)
