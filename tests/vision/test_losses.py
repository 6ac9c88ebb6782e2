"""Losses of classifiers: definitions written out plainly in float64, properties, gradients, mistakes."""

import math

import pytest
import torch
from torch.nn import functional as F

from vision import losses
from vision.losses import mlkd
from vlm_distill.losses import BatchLoss, DistillationLoss, FeatureLoss, LossError, Term, on_logits

SAMPLES = torch.arange(5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(n=6, c=5):
    return 2 * draw(n, c, seed=1), 2 * draw(n, c, seed=2)


def rotation(width, seed=9):
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


# The registry


def test_what_there_is():
    names = losses.available()
    assert {"kd", "dkd", "ctkd", "taid", "diagnostics", "cross_entropy", "hard_labels"} <= set(
        losses.available(DistillationLoss)
    )
    assert set(losses.available(BatchLoss)) == {"mlkd", "dist"}
    features = {"fitnet", "attention_transfer", "similarity_preserving", "relational_kd"}
    assert set(losses.available(FeatureLoss)) == features
    assert not {"uld", "hidden_states", "minilm", "vision_features", "projector_features"} & set(names)
    assert all(line.endswith(".") for line in names.values())
    assert [n for n in features if losses.build(n).whole_batch] == [
        n for n in features if n in ("similarity_preserving", "relational_kd")
    ]
    assert (losses.build("mlkd").views, losses.build("dist").views) == (2, 1)
    assert [n for n in names if losses.build(n).soft_targets] == ["cross_entropy"]


def test_mistakes_are_named():
    with pytest.raises(LossError, match=r"no loss is called 'mlkdd' \(did you mean 'mlkd'\?\); there are taid"):
        losses.build("mlkdd")
    with pytest.raises(LossError, match="loss dist has no parameter 'temperature'"):
        losses.build("dist", temperature=4)
    for name in ("dist", "fitnet", "cross_entropy"):
        with pytest.raises(LossError, match=f"loss {name}: standardise is for losses that compare"):
            losses.build(name, standardise=True)
    for given in ((), "4", 4.0):
        with pytest.raises(LossError, match="loss mlkd: temperatures is"):
            losses.build("mlkd", temperatures=given)
    with pytest.raises(LossError, match="loss mlkd: variant is 'code'"):
        losses.build("mlkd", variant="code")
    with pytest.raises(LossError, match="loss mlkd: standardise is 'yes'"):
        losses.build("mlkd", standardise="yes")
    for given in ({}, [1], {0: 1}, {"pooled": "pooled"}, {"1": 1}, {True: 1}):
        with pytest.raises(LossError, match=r"loss attention_transfer: layers is .*; give numbers of stages, stu"):
            losses.build("attention_transfer", layers=given)
    with pytest.raises(LossError, match="loss fitnet: relu is 0"):
        losses.build("fitnet", relu=0)
    with pytest.raises(LossError, match="only one of them is a map"):
        losses.build("fitnet", layers={2: "pooled"}).prepare({"stage2": (4, 3, 3)}, {"pooled": (8,)})


# Cross-entropy and hard labels

TARGETS = torch.tensor([0, 3, 4, 1, 1, 2])
SOFT = 0.3 * F.one_hot(TARGETS, 5) + 0.7 * F.one_hot(TARGETS.flip(0), 5)


@pytest.mark.parametrize("targets", [TARGETS, SOFT.double()], ids=["labels", "shares"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(targets, smoothing):
    loss = losses.build("cross_entropy", label_smoothing=smoothing)
    student = pair()[0].requires_grad_()
    shares = targets if targets.is_floating_point() else F.one_hot(targets, 5).double()
    shares = (1 - smoothing) * shares + smoothing / 5
    plain = -(shares * student.softmax(-1).log()).sum(-1)
    torch.testing.assert_close(loss(student, None, targets), plain)
    (gradient,) = torch.autograd.grad(plain.sum(), student)
    closed = loss.loss_and_grad(student.detach().clone(), None, targets, grad=True)
    torch.testing.assert_close(closed.loss, plain.detach())
    torch.testing.assert_close(closed.grad, gradient)
    assert loss.loss_and_grad(student.detach().clone(), None, targets, grad=False).grad is None
    sums = on_logits([Term("ce", loss)], student, None, targets)
    torch.testing.assert_close(torch.autograd.grad(sums.loss, student)[0], gradient)
    assert torch.autograd.gradcheck(lambda s: loss(s, None, targets), student)


def test_hard_labels():
    loss = losses.build("hard_labels")
    student, teacher = pair()
    chosen = torch.tensor([row.tolist().index(max(row.tolist())) for row in teacher])
    plain = -student.log_softmax(-1)[torch.arange(6), chosen]
    torch.testing.assert_close(loss(student, teacher), plain)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, teacher).sum(), leaf)
    closed = loss.loss_and_grad(student.clone(), teacher.clone(), grad=True)
    torch.testing.assert_close((closed.loss, closed.grad), (plain, gradient))
    assert torch.equal(loss(student, 7.0 * teacher + 2.0), plain)  # only the decision counts


# DIST


def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm() + 1e-8))


def test_dist_by_hand():
    student, teacher = pair()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    rows = sum(pearson(q[i], p[i]) for i in range(6)) / 6
    columns = sum(pearson(q[:, j], p[:, j]) for j in range(5)) / 5
    value = losses.build("dist", beta=0.5, gamma=2.0, tau=2.0)(student, teacher)
    assert value.item() == pytest.approx(4 * (0.5 * (1 - rows) + 2.0 * (1 - columns)), rel=1e-12)


def test_dist_is_zero_at_equality_and_takes_affine_maps_of_a_rows_probabilities():
    student, teacher = pair()
    assert losses.build("dist")(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    # 0.6 p + 0.4/C is still a distribution, and one affine map for all columns too.
    squeezed = (0.6 * teacher.softmax(-1) + 0.4 / 5).log()
    assert losses.build("dist")(squeezed, teacher).item() == pytest.approx(0.0, abs=1e-6)
    rows_alone = losses.build("dist", gamma=0.0)
    share = torch.tensor([0.2, 0.9, 0.5, 0.7, 0.3, 1.0], dtype=torch.float64).unsqueeze(1)
    each = (share * teacher.softmax(-1) + (1 - share) / 5).log()
    assert rows_alone(each, teacher).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.build("dist", beta=0.0)(each, teacher).item() > 1e-3
    assert rows_alone(student, teacher).item() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_where_nothing_varies(dtype):
    student = torch.zeros(4, 5, dtype=dtype)
    student[:, 0] = 300.0  # other columns underflow
    leaf = student.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.build("dist")(leaf, pair(4)[1].to(dtype)), leaf)
    assert gradient.isfinite().all()
    flat = torch.zeros(4, 5, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.build("dist")(flat, pair(4)[1].to(dtype)), flat)
    assert gradient.isfinite().all()


# MLKD


def mlkd_by_hand(student, teacher, temperature):
    """Instance, batch and class term of one view, entry by entry."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    n, c = p.shape
    instance = temperature**2 * sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(n)) / n
    batch = sum(float(p[i] @ p[j] - q[i] @ q[j]) ** 2 for i in range(n) for j in range(n)) / n
    classes = sum(float(p[:, i] @ p[:, j] - q[:, i] @ q[:, j]) ** 2 for i in range(c) for j in range(c)) / c
    return instance, batch, classes


@pytest.mark.parametrize("classes", [2, 3, 5])  # fewer than the images of a view, as many, more
def test_mlkd_by_hand(classes):
    student, teacher = pair(c=classes)
    value = losses.build("mlkd", temperatures=[2.0, 1.0])(student, teacher)
    want = sum(sum(mlkd_by_hand(student[v], teacher[v], t)) for v in (slice(0, 3), slice(3, 6)) for t in (2.0, 1.0))
    assert value.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("images", [4, 5])
def test_mlkd_as_published(images):
    student, teacher = pair(2 * images)
    weak, strong = slice(0, images), slice(images, 2 * images)
    value = losses.build("mlkd", variant="published")(student, teacher)
    # Half of the images and classes, the middle one counted with the lower half.
    share, class_share = math.ceil(images / 2) / images, 3 / 5
    want = 0.0
    for t in (4.0, 3.0, 5.0, 2.0, 6.0):
        instance, batch, classes = mlkd_by_hand(student[weak], teacher[weak], t)
        second = weak if t in (2.0, 6.0) else strong
        want += share * (instance + batch) + class_share * classes
        want += mlkd_by_hand(student[second], teacher[second], t)[0]
    assert value.item() == pytest.approx(want, rel=1e-12)


def test_mlkds_relations_keep_their_digits_close_to_the_teacher():
    p = pair(3, 5)[1].softmax(-1)
    q = p + 1e-3 * (pair(3, 5)[0].softmax(-1) - p)
    for exact, rounded in zip(mlkd.relation_terms(q, p), mlkd.relation_terms(q.float(), p.float()), strict=True):
        assert rounded.item() == pytest.approx(exact.item(), rel=1e-3)


def test_mlkd_standardises_its_instance_term_alone():
    student, teacher = pair()
    scaled = 3.0 * student + 1.0

    def parts(given):
        plain = losses.build("mlkd", temperatures=[4.0])(given, teacher)
        return plain, losses.build("mlkd", temperatures=[4.0], standardise=True)(given, teacher)

    def instance(given):
        plain, changed = parts(given)
        others = sum(sum(mlkd_by_hand(given[v], teacher[v], 4.0)[1:]) for v in (slice(0, 3), slice(3, 6)))
        return changed.item() - others, plain.item() - others

    assert instance(student)[0] == pytest.approx(instance(scaled)[0], rel=1e-6)
    assert instance(student)[1] != pytest.approx(instance(scaled)[1], rel=1e-2)


@pytest.mark.parametrize("params", [{}, {"variant": "published"}, {"standardise": True}])
def test_mlkd_is_zero_at_equality_and_has_its_gradient(params):
    student, teacher = pair(4, 3)
    loss = losses.build("mlkd", **params)
    assert loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student.requires_grad_())
    assert loss(student.float(), teacher.float()).item() == pytest.approx(loss(student, teacher).item(), rel=1e-4)


def test_dist_has_its_gradient():
    student, teacher = pair(4, 3)
    assert torch.autograd.gradcheck(lambda s: losses.build("dist")(s, teacher), student.requires_grad_())


def test_logits_in_16_bits_are_raised():
    student, teacher = pair()
    for name in losses.available(BatchLoss):
        value = losses.build(name)(student.bfloat16(), teacher.bfloat16())
        assert value.dtype == torch.float32
        assert value.ndim == 0


# Features

MAPS = {"stage1": (4, 6, 6), "stage2": (6, 3, 3), "stage3": (8, 2, 2), "stage-1": (8, 2, 2), "pooled": (8,)}
LARGE = {"stage1": (5, 8, 8), "stage2": (7, 6, 6), "stage3": (9, 2, 2), "stage-1": (9, 2, 2), "pooled": (9,)}


def features(shapes, seed, n=5):
    return {name: draw(n, *shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def prepared(name, student=MAPS, teacher=LARGE, **params):
    torch.manual_seed(0)
    loss = losses.build(name, **params)
    loss.prepare({k: student[k] for k in loss.student_features}, {k: teacher[k] for k in loss.teacher_features})
    return loss.double()


FEATURES = [
    ("fitnet", {}),
    ("fitnet", {"layers": {1: 1, "pooled": "pooled"}, "relu": False}),
    ("attention_transfer", {}),
    ("similarity_preserving", {}),
    ("similarity_preserving", {"layers": {2: 3, "pooled": "pooled"}}),
    ("relational_kd", {}),
]


@pytest.mark.parametrize(("name", "params"), FEATURES)
def test_features_give_a_value_an_image_or_one_and_their_gradient(name, params):
    loss = prepared(name, **params)
    assert loss.unit == "image"
    student, teacher = features(MAPS, 10), features(LARGE, 20)
    value = loss(student, teacher, SAMPLES)
    assert value.shape == (() if loss.whole_batch else (5,))
    low = prepared(name, **params).float()
    halves = ({k: x.bfloat16() for k, x in side.items()} for side in (student, teacher))
    assert low(*halves, SAMPLES).dtype == torch.float32
    read = loss.student_features[0]

    def of(x):
        return loss({**student, read: x}, teacher, SAMPLES)

    assert torch.autograd.gradcheck(of, student[read].requires_grad_(), atol=1e-6)


def test_fitnet_by_hand():
    loss = prepared("fitnet", layers={2: 1, "pooled": "pooled"})
    student, teacher = features(MAPS, 10), features(LARGE, 20)
    want = torch.zeros(5, dtype=torch.float64)
    # The teacher's 8 × 8 map falls to the student's 3 × 3.
    small = F.adaptive_avg_pool2d(teacher["stage1"], 3)
    for regressor, x, y in zip(
        loss.regressors,
        (student["stage2"], student["pooled"][..., None, None]),
        (small, teacher["pooled"][..., None, None]),
        strict=True,
    ):
        convolution = regressor[0]
        made = torch.einsum("oi,nihw->nohw", convolution.weight[:, :, 0, 0], x) + convolution.bias.view(-1, 1, 1)
        mean, variance = made.mean((0, 2, 3), keepdim=True), made.var((0, 2, 3), correction=0, keepdim=True)
        made = ((made - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
        want += ((made - y) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss(student, teacher, SAMPLES), want)
    assert {n.split(".")[0] for n, _ in loss.named_parameters()} == {"regressors"}


def test_fitnet_is_learnt_to_zero():
    student = features(MAPS, 10, n=5)
    teacher = {"stage2": torch.einsum("oi,nihw->nohw", draw(7, 6), student["stage2"])}
    teacher["stage2"] -= teacher["stage2"].mean((0, 2, 3), keepdim=True)
    loss = prepared("fitnet", MAPS, {"stage2": (7, 3, 3)}, relu=False)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = loss(student, teacher, SAMPLES).mean()
        value.backward()
        return value

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < 1e-3 * before


def test_attention_transfer_by_hand():
    student, teacher = features(MAPS, 10), features(LARGE, 20)
    want = torch.zeros(5, dtype=torch.float64)
    for name, side in (("stage1", 6), ("stage2", 3), ("stage3", 2)):
        for image in range(5):
            maps = []
            for x in (student[name][image], F.adaptive_avg_pool2d(teacher[name][image], side)):
                attention = sum(channel**2 for channel in x).flatten()
                maps.append(attention / math.sqrt(float(attention @ attention)))
            want[image] += ((maps[0] - maps[1]) ** 2).sum() / side**2
    torch.testing.assert_close(prepared("attention_transfer")(student, teacher, SAMPLES), want)


def test_attention_transfer_sees_where_not_what():
    student = features(MAPS, 10)
    loss = losses.build("attention_transfer")
    # Other channels in another order, of another size and sign.
    teacher = {k: -3.0 * x.flip(1) for k, x in student.items()}
    torch.testing.assert_close(loss(student, teacher, SAMPLES), torch.zeros(5, dtype=torch.float64))
    moved = {k: x.flip(2) if x.ndim == 4 else x for k, x in student.items()}
    assert (loss(student, moved, SAMPLES) > 1e-4).all()
    dead = {k: torch.zeros_like(x).requires_grad_() for k, x in student.items()}
    gradient = torch.autograd.grad(loss(dead, teacher, SAMPLES).sum(), dead["stage1"])[0]
    assert gradient.isfinite().all()


def test_similarity_preserving_by_hand():
    student, teacher = features(MAPS, 10), features(LARGE, 20)

    def rows(x):
        x = x.flatten(1)
        gram = torch.tensor([[float(a @ b) for b in x] for a in x], dtype=torch.float64)
        return gram / gram.norm(dim=1, keepdim=True)

    want = sum(
        ((rows(student[a]) - rows(teacher[b])) ** 2).sum() / 25 for a, b in (("stage2", "stage3"), ("pooled", "pooled"))
    )
    loss = losses.build("similarity_preserving", layers={2: 3, "pooled": "pooled"})
    torch.testing.assert_close(loss(student, teacher, SAMPLES), want)


def test_similarity_preserving_does_not_see_rotation_or_scale():
    x = draw(5, 8)
    loss = losses.build("similarity_preserving", layers={"pooled": "pooled"})
    zero = loss({"pooled": 2.0 * x @ rotation(8)}, {"pooled": x}, SAMPLES)
    torch.testing.assert_close(zero, torch.zeros((), dtype=torch.float64))
    assert loss({"pooled": x + 1.0}, {"pooled": x}, SAMPLES) > 1e-3


def relations_by_hand(x):
    n = len(x)
    distances = [[float((a - b).norm()) for b in x] for a in x]
    mean = sum(map(sum, distances)) / sum(d > 0 for row in distances for d in row)
    angles = torch.zeros(n, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for k in range(n):
                if distances[i][j] > 0 and distances[i][k] > 0:
                    angles[i, j, k] = (x[j] - x[i]) @ (x[k] - x[i]) / (distances[i][j] * distances[i][k])
    return torch.tensor(distances, dtype=torch.float64) / mean, angles


@pytest.mark.parametrize("coinciding", [False, True])
def test_relational_kd_by_hand(coinciding):
    student, teacher = {"pooled": 3 * draw(5, 8, seed=3)}, {"pooled": draw(5, 9, seed=4)}
    if coinciding:
        student["pooled"][2] = student["pooled"][0]

    def huber(a, b):
        gap = (a - b).abs()
        return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()

    (s, s_angles), (t, t_angles) = relations_by_hand(student["pooled"]), relations_by_hand(teacher["pooled"])
    leaf = student["pooled"].requires_grad_()
    value = losses.build("relational_kd")({"pooled": leaf}, teacher, SAMPLES)
    assert value.item() == pytest.approx(float(25 * huber(s, t) + 50 * huber(s_angles, t_angles)), rel=1e-12)
    assert torch.autograd.grad(value, leaf)[0].isfinite().all()


def test_relational_kd_does_not_see_rotation_scale_or_shift():
    x = draw(5, 8)
    loss = losses.build("relational_kd")
    assert loss({"pooled": 4.0 * x @ rotation(8) - 3.0}, {"pooled": x}, SAMPLES).item() == pytest.approx(0.0, abs=1e-12)
    assert loss({"pooled": x * torch.arange(8)}, {"pooled": x}, SAMPLES).item() > 0.1


def test_relational_kd_of_one_image_or_equal_ones_is_zero():
    loss = losses.build("relational_kd")
    for n in (1, 3):
        x = torch.ones(n, 8, requires_grad=True)
        value = loss({"pooled": x}, {"pooled": torch.ones(n, 8)}, SAMPLES)
        value.backward()
        assert value.item() == 0.0
        assert torch.equal(x.grad, torch.zeros(n, 8))
