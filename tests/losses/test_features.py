"""Losses on features: definitions by hand, properties, projections, grids, relations between a sample's own tokens."""

import math

import pytest
import torch
from torch import nn

from vlm_distill import losses
from vlm_distill.losses import FeatureTerm, LossError, Term, wanted_features

SAMPLES = torch.tensor([0, 0, 0, 2, 2, 5])
QKV = ("queries", "keys", "values")
DISTANCES = ("mse", "normalised_mse", "cosine")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepared(name, student, teacher, **params):
    """Return a loss prepared for these features, in float64."""

    def shapes(features):
        return {k: (x.shape[1] if x.ndim == 3 else None, x.shape[-1]) for k, x in features.items()}

    torch.manual_seed(0)
    loss = losses.build(name, **params)
    loss.prepare(shapes(student), shapes(teacher))
    return loss.double()


def distance(kind, student, teacher):
    """Compute the distance by the formula, one vector at a time."""
    if kind == "cosine":
        return 1 - (student @ teacher) / (student.norm() * teacher.norm())
    if kind == "normalised_mse":
        student, teacher = ((x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in (student, teacher))
    return sum((student - teacher) ** 2) / len(student)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("width", [5, 7])
def test_hidden_states_by_hand(kind, width):
    student = {"hidden.-1": draw(6, 5, seed=1), "hidden.2": draw(6, 5, seed=2)}
    teacher = {"hidden.-1": draw(6, width, seed=3), "hidden.4": draw(6, width, seed=4)}
    loss = prepared("hidden_states", student, teacher, layers={-1: -1, 2: 4}, distance=kind)
    assert (loss.student_features, loss.teacher_features) == (("hidden.-1", "hidden.2"), ("hidden.-1", "hidden.4"))
    learned = [isinstance(p, nn.Linear) for p in loss.projections]
    assert learned == [width != 5] * 2
    got = loss(student, teacher, SAMPLES)
    expected = torch.zeros(6, dtype=torch.float64)
    for row in range(6):
        for mine, other, projection in zip(student, teacher, loss.projections, strict=True):
            expected[row] += distance(kind, projection(student[mine][row]), teacher[other][row]) / 2
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("name", "feature"), [("vision_features", "vision"), ("projector_features", "projector")])
@pytest.mark.parametrize("kind", DISTANCES)
def test_image_features_are_means_over_an_images_tokens(name, feature, kind):
    student, teacher = {feature: draw(3, 6, 4, seed=1)}, {feature: draw(3, 6, 5, seed=2)}
    loss = prepared(name, student, teacher, distance=kind)
    assert loss.unit == "image"
    projected = loss.projections[0](student[feature])
    expected = [
        sum(distance(kind, projected[image, token], teacher[feature][image, token]) for token in range(6)) / 6
        for image in range(3)
    ]
    torch.testing.assert_close(loss(student, teacher, torch.tensor([])), torch.stack(expected))


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_a_finer_grid_is_averaged_to_the_coarser(longer):
    fine, coarse = draw(2, 16, 3, seed=1), draw(2, 4, 3, seed=2)
    blocks = fine.reshape(2, 2, 2, 2, 2, 3).mean((2, 4)).reshape(2, 4, 3)  # image, row, in it, column, in it, width
    student, teacher = (fine, coarse) if longer == "student" else (coarse, fine)
    loss = prepared("vision_features", {"vision": student}, {"vision": teacher})
    expected = (blocks - coarse).square().mean((1, 2))
    torch.testing.assert_close(loss({"vision": student}, {"vision": teacher}, SAMPLES), expected)


def test_uneven_grids_are_averaged_too():
    loss = prepared("vision_features", {"vision": draw(1, 25, 3)}, {"vision": draw(1, 4, 3)})
    constant = {"vision": torch.ones(1, 25, 3)}
    assert loss(constant, {"vision": torch.ones(1, 4, 3)}, SAMPLES).abs().max() < 1e-12


@pytest.mark.parametrize(("student", "teacher", "odd"), [(17, 16, 17), (16, 17, 17), (12, 9, 12)])
def test_tokens_that_form_no_square_are_refused_before_and_during_a_run(student, teacher, odd):
    message = f"is {student} tokens for the student and {teacher} for the teacher, and {odd} form no square grid"
    features = {"vision": draw(1, student, 3)}, {"vision": draw(1, teacher, 3)}
    with pytest.raises(LossError, match=message):
        prepared("vision_features", *features)
    loss = losses.build("vision_features")
    loss.prepare({"vision": (None, 3)}, {"vision": (teacher, 3)})
    with pytest.raises(LossError, match=message):
        loss(*features, SAMPLES)


def relation(x, heads):
    """Compute softmax(x xᵀ/√d) of one sample's ``x [n, width]``, head by head."""
    return [(part @ part.T / math.sqrt(part.shape[1])).softmax(-1) for part in x.chunk(heads, -1)]


def qkv(widths, seed):
    return {name: draw(6, width, seed=seed + i) for i, (name, width) in enumerate(zip(QKV, widths, strict=True))}


def test_minilm_by_hand():
    # Shared keys: the student's keys and values are narrower than its queries, and all of them than the teacher's.
    student, teacher = qkv((8, 4, 4), 1), qkv((12, 12, 12), 7)
    loss = prepared("minilm", student, teacher, relation_heads=2)
    expected = torch.zeros(6, dtype=torch.float64)
    for name in QKV:
        for sample in SAMPLES.unique():
            rows = (sample == SAMPLES).nonzero().flatten()
            for p, q in zip(*(relation(x[name][rows], 2) for x in (teacher, student)), strict=True):
                expected[rows] += (p * (p / q).log()).sum(-1) / 2
    got = loss(student, teacher, SAMPLES)
    torch.testing.assert_close(got, expected)
    assert got[5] == 0  # a lone token is related to itself alone
    assert (got >= 0).all()


def test_minilm_takes_samples_apart():
    student, teacher = qkv((8, 8, 8), 1), qkv((8, 8, 8), 7)
    loss = prepared("minilm", student, teacher, relation_heads=4)
    together = loss(student, teacher, SAMPLES)
    for sample in SAMPLES.unique():
        rows = sample == SAMPLES
        one = loss({k: x[rows] for k, x in student.items()}, {k: x[rows] for k, x in teacher.items()}, SAMPLES[rows])
        torch.testing.assert_close(together[rows], one)


def test_minilm_is_zero_at_equal_relations():
    student = qkv((8, 8, 8), 1)
    loss = prepared("minilm", student, student, relation_heads=2)
    assert loss(student, {k: x.clone() for k, x in student.items()}, SAMPLES).abs().max() < 1e-14
    turned = {k: -x for k, x in student.items()}  # the same inner products
    assert loss(student, turned, SAMPLES).abs().max() < 1e-14


CASES = {
    "hidden_states": ({"hidden.-1": (6, 5)}, {"hidden.-1": (6, 7)}),
    "vision_features": ({"vision": (2, 4, 3)}, {"vision": (2, 9, 5)}),
    "projector_features": ({"projector": (2, 9, 3)}, {"projector": (2, 4, 3)}),
    "minilm": (dict.fromkeys(QKV, (6, 4)), dict.fromkeys(QKV, (6, 8))),
}


def case(name, kind=None):
    student, teacher = ({k: draw(*shape, seed=i + 3 * side) for i, (k, shape) in enumerate(shapes.items())}
                        for side, shapes in enumerate(CASES[name]))  # fmt: skip
    params = {"relation_heads": 2} if name == "minilm" else {"distance": kind or "mse"}
    return prepared(name, student, teacher, **params), student, teacher


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in CASES for k in (DISTANCES if n != "minilm" else (None,))])
def test_gradients(name, kind):
    loss, student, teacher = case(name, kind)
    inputs = [x.requires_grad_() for x in student.values()]
    learned = list(loss.parameters())
    assert torch.autograd.gradcheck(lambda *_: loss(student, teacher, SAMPLES), (*inputs, *learned), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_compare_gives_zero_gradients(name):
    loss, student, teacher = case(name)
    inputs = [x.requires_grad_() for x in student.values()]
    none = loss({k: x[:0] for k, x in student.items()}, {k: x[:0] for k, x in teacher.items()}, SAMPLES[:0])
    assert none.shape == (0,)
    none.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (*inputs, *loss.parameters()))


@pytest.mark.parametrize("name", CASES)
def test_sixteen_bits_are_compared_in_float32(name):
    loss, student, teacher = case(name)
    loss = loss.bfloat16()
    half = [{k: x.bfloat16() for k, x in side.items()} for side in (student, teacher)]
    got = loss(*half, SAMPLES)
    assert got.dtype == torch.float32
    exact = loss.double()(*({k: x.double() for k, x in side.items()} for side in half), SAMPLES)
    torch.testing.assert_close(got.double(), exact, rtol=0.03, atol=0.01)  # a projection is in the models' precision


def test_what_the_terms_read_is_asked_for_once():
    terms = [
        Term("taid", losses.build("taid")),
        FeatureTerm("a", losses.build("hidden_states", layers={-1: -1, 0: 0})),
        FeatureTerm("b", losses.build("hidden_states", layers={-1: 4})),
        FeatureTerm("c", losses.build("minilm")),
    ]
    assert wanted_features(terms) == (
        ("hidden.-1", "hidden.0", *QKV),
        ("hidden.-1", "hidden.0", "hidden.4", *QKV),
    )
    assert wanted_features(terms[:1]) == ((), ())


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("hidden_states", {"layers": {}}, r"loss hidden_states: layers is \{\}; give whole numbers"),
        ("hidden_states", {"layers": [1, 2]}, "loss hidden_states: layers is"),
        ("hidden_states", {"layers": {"last": -1}}, "loss hidden_states: layers is"),
        ("hidden_states", {"distance": "l1"}, "loss hidden_states: distance is 'l1'; it must be one of mse, norm"),
        ("vision_features", {"layers": {1: 1}}, "loss vision_features has no parameter 'layers'"),
        ("projector_features", {"distance": None}, "loss projector_features: distance is None"),
        ("minilm", {"relation_heads": 0}, "loss minilm: relation_heads is 0; give a whole number of at least 1"),
        ("minilm", {"relation_heads": True}, "loss minilm: relation_heads is True"),
    ],
)
def test_mistakes_get_one_line(name, params, message):
    with pytest.raises(LossError, match=message) as caught:
        losses.build(name, **params)
    assert "\n" not in str(caught.value)


def test_relation_heads_must_divide():
    shapes = {"queries": (None, 24), "keys": (None, 12), "values": (None, 12)}
    with pytest.raises(LossError, match=r"8 relation_heads do not divide the student's keys of width 12; .* of 12"):
        losses.build("minilm").prepare(shapes, shapes)
