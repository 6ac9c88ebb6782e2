"""Visual attention: its definition, its gradient, and how layers are grouped."""

import pytest
import torch

from vlm_distill import losses
from vlm_distill.losses import AttentionFeature, LossError

SAMPLES = torch.tensor([0, 0, 0, 2, 2])


def draw(layers, seed=0):
    """Attention that five image tokens get from four queries of the first sample and two of the second."""
    attention = torch.rand(5, layers, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    attention[3:, :, 2:] = 0
    return attention


def value(student, teacher, samples=SAMPLES):
    loss = losses.build("visual_attention")
    (name,) = loss.student_features
    loss.prepare({name: (None, student.shape[1])}, {name: (None, teacher.shape[1])})
    return loss({name: student}, {name: teacher}, samples)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def test_it_is_one_minus_the_mean_cosine_with_groups_of_the_teachers_layers():
    student, teacher = draw(3, seed=1), draw(5, seed=2)
    expected = []
    for tokens, queries in (([0, 1, 2], 4), ([3, 4], 2)):
        cosines = []
        for j in range(3):
            places = [(t, q) for t in tokens for q in range(queries)]
            mine = [float(student[t, j, q]) for t, q in places]
            # Of five layers for three, each group has 5 - 3 + 1 = 3.
            theirs = [sum(float(teacher[t, layer, q]) for layer in range(j, j + 3)) / 3 for t, q in places]
            cosines.append(cosine(mine, theirs))
        expected.append(1 - sum(cosines) / 3)
    torch.testing.assert_close(value(student, teacher), torch.tensor(expected, dtype=torch.float64))


def test_its_gradient_is_right_and_reaches_the_student_alone():
    student, teacher = draw(2, seed=1).requires_grad_(), draw(3, seed=2)
    assert torch.autograd.gradcheck(lambda x: value(x, teacher), student)


def test_equal_attention_costs_nothing():
    assert value(3 * draw(2), draw(2)).abs().max() < 1e-12


def test_without_image_tokens_it_is_empty_and_in_the_graph():
    student = torch.zeros(0, 2, 0, requires_grad=True)
    found = value(student, torch.zeros(0, 3, 0), SAMPLES[:0])
    assert found.shape == (0,)
    found.sum().backward()


def test_a_features_name_says_all_of_it():
    loss = losses.build("visual_attention", layers=[0.25, 1], queries="answers")
    assert AttentionFeature.parse(*loss.student_features) == AttentionFeature(0.25, 1.0, "answers")
    assert AttentionFeature.parse("hidden.3") is AttentionFeature.parse("attention") is None


@pytest.mark.parametrize("layers", [0.5, [0.3], [0.7, 0.3], [0.3, 2], ["a", "b"], [True, 2]])
def test_layers_must_be_a_range(layers):
    with pytest.raises(LossError, match=r"loss visual_attention: layers is .*; give two shares of the depth"):
        losses.build("visual_attention", layers=layers)


def test_a_deeper_student_is_refused():
    with pytest.raises(LossError, match="the student has 3 layers there, the teacher 2"):
        value(draw(3), draw(2))
