"""Vision-language affinity: its definition, its gradient, and what it ignores."""

import torch

from vlm_distill import losses

SAMPLES, OF_TEXT = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 0, 2, 2, 2, 2])


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(image, text):
    return {"image_hidden": image, "text_hidden:all": text, "text_samples:all": OF_TEXT[: len(text)]}


def value(student, teacher, samples=SAMPLES):
    return losses.build("vision_language_affinity")(features(*student), features(*teacher), samples)


STUDENT, TEACHER = [(draw(5, w, seed=w), draw(6, w, seed=w + 1)) for w in (4, 7)]


def test_it_is_the_mean_smooth_l1_of_cosines():
    expected = []
    for images, texts in (([0, 1, 2], [0, 1]), ([3, 4], [2, 3, 4, 5])):
        total = 0.0
        for i in images:
            for j in texts:
                a, b = (x[i] @ y[j] / (x[i].norm() * y[j].norm()) for x, y in (STUDENT, TEACHER))
                gap = float((a - b).abs())
                total += gap**2 / 2 if gap < 1 else gap - 0.5
        expected.append(total / (len(images) * len(texts)))
    torch.testing.assert_close(value(STUDENT, TEACHER), torch.tensor(expected, dtype=torch.float64))


def test_its_gradient_is_right_and_reaches_the_student_alone():
    student = [x.clone().requires_grad_() for x in STUDENT]
    assert torch.autograd.gradcheck(lambda *x: value(x, TEACHER), student)


def test_rotating_a_model_and_stretching_its_tokens_changes_nothing():
    rotation, lengths = torch.linalg.qr(draw(4, 4, seed=3)).Q, draw(5, 1, seed=4).exp()
    moved = lengths * STUDENT[0] @ rotation, 3 * STUDENT[1] @ rotation
    torch.testing.assert_close(value(moved, TEACHER), value(STUDENT, TEACHER))
    assert value(moved, STUDENT).abs().max() < 1e-12


def test_without_image_tokens_it_is_empty_and_in_the_graph():
    student = [torch.zeros(0, 4, requires_grad=True) for _ in range(2)]
    found = value(student, [torch.zeros(0, 3)] * 2, SAMPLES[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert all(x.grad is not None for x in student)
