"""The losses row by row: closed forms against definitions, properties, infinities, parameters."""

import inspect
import math

import pytest
import torch

from vision import losses as vision_losses
from vlm_distill import losses
from vlm_distill.losses import DistillationLoss, Entry, LossError
from vlm_distill.losses.divergence import Divergence

DIVERGENCES = {
    "forward_kl": {},
    "forward_kl at T": {"temperature": 2.5},
    "reverse_kl": {},
    "reverse_kl at T": {"temperature": 0.5},
    "jsd": {},
    "jsd at T": {"beta": 0.1, "temperature": 3.0},
    "skew_forward_kl": {},
    "skew_forward_kl at T": {"alpha": 0.7, "temperature": 2.0},
    "skew_reverse_kl": {},
    "skew_reverse_kl at T": {"alpha": 0.7, "temperature": 2.0},
    "tvd": {},
    "adaptive_kl": {},
    "adaptive_kl at T": {"mu": 0.8, "temperature": 2.0},
    "alpha_beta": {},
    "alpha_beta at T": {"alpha": 0.9, "beta": -0.3, "temperature": 2.0},
    "alpha_beta near an axis": {"alpha": 0.8, "beta": 1e-4},
    "alpha_beta on the other axis": {"alpha": 0.0, "beta": 0.6},
    "alpha_beta where the sum is 0": {"alpha": 0.1, "beta": -0.1},
    "alpha_beta near the origin": {"alpha": 0.04, "beta": 0.01},
    "todi": {},
    "todi at T": {"temperature": 2.0},
    "amid": {},
    "amid at T": {"temperature": 2.0, "alpha": 3.0, "order": "rq"},
    "amid of logits": {"alpha": 1.0, "order": "rp"},
    "amid qr": {"alpha": -1.0, "mix": 0.9, "order": "qr"},
    "amid held qr": {"order": "qr", "hold": True},
    "amid held rq": {"order": "rq", "hold": True},
    "skew_reverse_kl held": {"hold": True},
    "kd": {"temperature": 2.0},
    "taid": {"t_start": 0.3},
    "taid at 0": {"t_start": 0.0},
    "taid at 1": {"t_start": 1.0},
    "taid linear": {"schedule": "linear"},
    "taid over jsd": {"divergence": {"name": "jsd", "beta": 0.2}, "schedule": "linear"},
    "taid over tvd": {"divergence": "tvd"},
    "taid over adaptive_kl": {"divergence": "adaptive_kl"},
    "taid over alpha_beta": {"divergence": "alpha_beta"},
    "taid over todi": {"divergence": "todi"},
    "taid over amid": {"divergence": {"name": "amid", "order": "qr"}},
    "taid of probabilities": {"power": 1.0, "divergence": "reverse_kl"},
    "taid at power 0.5": {"power": 0.5},
    "uld": {},
    "uld at T": {"temperature": 2.0},
}
EVERY = {**DIVERGENCES, "cross_entropy": {}, "dkd": {"temperature": 2.0}, "dkd at 1": {"temperature": 1.0, "beta": 0.5}}
EVERY["ctkd"] = {"t_range": 2.0, "grl_coefficient": -1.0}
# Held fixed in the gradient: TAID's target, adaptive KL's and ToDi's weights, the student in a mixture.
HELD = ("taid", "adaptive_kl", "todi", "amid held", "skew_reverse_kl held")
SHAPES = [(3, 47), (31, 123), (1, 7)]


def make(name, params=None):
    return losses.build(name.split()[0], **(EVERY.get(name, {}) if params is None else params))


def logits(n, v, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    teacher = 3 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype), torch.randint(v, (n,), generator=generator)


def rows(loss, student, teacher, targets=None, grad=True):
    """Call `loss_and_grad` on copies, since it may overwrite its arguments."""
    return loss.loss_and_grad(student.clone(), teacher.clone(), targets, grad=grad)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_form_equals_definition(name, shape):
    loss = make(name)
    student, teacher, targets = logits(*shape)
    leaf = student.clone().requires_grad_()
    values = loss(leaf, teacher, targets)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    with torch.no_grad():  # as in the engine
        closed, without = rows(loss, student, teacher, targets), rows(loss, student, teacher, targets, grad=False)
    torch.testing.assert_close(closed.loss, values.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(closed.grad, gradient, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(without.loss, closed.loss, rtol=0, atol=0)
    assert without.grad is None
    assert closed.loss.shape == shape[:1]
    assert closed.loss.dtype == torch.float64


def test_adaptive_kl_as_the_taid_code_has_it():
    # Not a divergence (test_golden compares it with that code): not 0 at equality, and it depends on the tokens' order.
    loss = losses.build("adaptive_kl", convention="taid")
    student, teacher, _ = logits(31, 123)
    leaf = student.clone().requires_grad_()
    values = loss(leaf, teacher)
    closed = rows(loss, student, teacher)
    torch.testing.assert_close(closed.loss, values.detach())
    torch.testing.assert_close(closed.grad, torch.autograd.grad(values.sum(), leaf)[0])
    assert rows(loss, student, teacher, grad=False).grad is None
    assert not loss.takes_topk


@pytest.mark.parametrize("name", [n for n in EVERY if not n.startswith(HELD)])
def test_definition_passes_gradcheck(name):
    student, teacher, targets = logits(2, 5)
    assert torch.autograd.gradcheck(lambda s: make(name)(s, teacher, targets), student.requires_grad_())


def test_taid_gradient_by_finite_differences_with_the_target_held_still():
    loss = make("taid")
    student, teacher, _ = logits(2, 5)
    p = ((1 - loss.t) * student + loss.t * teacher).softmax(-1)
    probe = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: (p * (p.log() - s.log_softmax(-1))).sum(-1), probe)
    (held,) = torch.autograd.grad((p * -probe.log_softmax(-1)).sum(), probe)
    torch.testing.assert_close(rows(loss, student, teacher).grad, held)


def test_adaptive_kl_gradient_by_finite_differences_with_the_weights_held_still():
    student, teacher, _ = logits(2, 5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    gap = (p - q).abs()
    # By hand: with the likeliest token first, what lies beyond half of the mass is tail.
    order = p.argsort(-1, descending=True)
    head = torch.zeros(2, dtype=torch.float64)
    for row in range(2):
        mass = 0.0
        for place, token in enumerate(order[row].tolist()):
            mass += p[row, token].item()
            if place == 0 or mass <= 0.5:
                head[row] += gap[row, token]
    weight = head / gap.sum(-1)

    def held(s):
        log_q = s.log_softmax(-1)
        forward, reverse = (p * (p.log() - log_q)).sum(-1), (log_q.exp() * (log_q - p.log())).sum(-1)
        return weight * forward + (1 - weight) * reverse

    probe = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(held, probe)
    result = rows(make("adaptive_kl"), student, teacher)
    torch.testing.assert_close(result.loss, held(student))
    torch.testing.assert_close(result.grad, torch.autograd.grad(held(probe).sum(), probe)[0])


@pytest.mark.parametrize("name", EVERY)
def test_float32_keeps_to_float64(name):
    loss = make(name)
    student, teacher, targets = logits(31, 123, torch.float32)
    exact = rows(loss, student.double(), teacher.double(), targets)
    found = rows(loss, student, teacher, targets)
    assert found.loss.dtype == found.grad.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=5e-6, atol=5e-6)
    tolerance = 1e-5 * exact.grad.abs().max().item() + 5e-7
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_logits_are_raised_to_float32(name):
    loss = make(name)
    student, teacher, targets = logits(3, 47, torch.bfloat16)
    want = rows(loss, student.float(), teacher.float(), targets)
    got = rows(loss, student, teacher, targets)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad, want.grad)
    torch.testing.assert_close(loss(student, teacher, targets), want.loss)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_at_equality_with_zero_gradient(name):
    student, _, _ = logits(31, 123)
    result = rows(make(name), student, student)
    torch.testing.assert_close(result.loss, torch.zeros(31, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(result.grad, torch.zeros_like(student), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", EVERY)
def test_never_negative_and_gradient_sums_to_zero(name):
    result = rows(make(name), *logits(31, 123))
    assert result.loss.min() >= -1e-14
    torch.testing.assert_close(result.grad.sum(-1), torch.zeros(31, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_moving_all_logits_by_a_constant_changes_nothing(name):
    student, teacher, targets = logits(3, 47)
    moved = rows(make(name), student + 5, teacher - 7, targets)
    torch.testing.assert_close(moved.loss, rows(make(name), student, teacher, targets).loss, rtol=1e-12, atol=1e-13)


def test_limits_of_the_parameters():
    student, teacher = (x / 3 for x in logits(31, 123)[:2])  # mild, so that the limits are near at β = 1e-6
    forward, reverse = (rows(losses.build(n), student, teacher).loss for n in ("forward_kl", "reverse_kl"))
    assert rows(losses.build("jsd", beta=0.0), student, teacher).loss.abs().max() < 1e-13
    assert rows(losses.build("jsd", beta=1.0), student, teacher).loss.abs().max() < 1e-13
    # JSD/β → KL(p‖q) as β → 0, JSD/(1−β) → KL(q‖p) as β → 1
    small = 1e-6
    torch.testing.assert_close(
        rows(losses.build("jsd", beta=small), student, teacher).loss / small, forward, rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(
        rows(losses.build("jsd", beta=1 - small), student, teacher).loss / small, reverse, rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(rows(make("taid at 1"), student, teacher).loss, forward)
    assert rows(make("taid at 0"), student, teacher).grad.abs().max() == 0
    # at small t, TAID's gradient is t·q·(gap − mean gap)
    gap, q = student - teacher, student.softmax(-1)
    first_order = q * (gap - (q * gap).sum(-1, keepdim=True))
    torch.testing.assert_close(
        rows(losses.build("taid", t_start=small), student, teacher).grad / small, first_order, rtol=1e-3, atol=1e-5
    )


def test_the_skews_limits_are_the_kls():
    student, teacher, _ = logits(3, 47)
    for name in ("forward_kl", "reverse_kl"):
        skewed = rows(losses.build(f"skew_{name}", alpha=1e-9), student, teacher)
        plain = rows(losses.build(name), student, teacher)
        torch.testing.assert_close(skewed.loss, plain.loss, rtol=1e-4, atol=1e-6)
        assert rows(losses.build(f"skew_{name}", alpha=1.0), student, teacher).loss.abs().max() < 1e-12


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_by_the_other_convention_ends_in_the_kls(beta, name):
    student, teacher, _ = logits(3, 47)
    got = rows(losses.build("jsd", beta=beta, convention="limit"), student, teacher)
    want = rows(losses.build(name), student, teacher)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.grad, want.grad)


def test_kd_has_the_factor_t_squared():
    student, teacher, _ = logits(3, 47)
    plain = rows(losses.build("forward_kl", temperature=4.0), student, teacher)
    kd = rows(losses.build("kd"), student, teacher)
    torch.testing.assert_close(kd.loss, 16 * plain.loss)
    torch.testing.assert_close(kd.grad, 16 * plain.grad)


def test_dkd_is_kd_when_beta_is_the_mass_of_the_others():
    student, teacher, targets = logits(1, 47)
    others = 1.0 - (teacher / 4).softmax(-1)[0, targets[0]].item()
    got = rows(losses.build("dkd", alpha=1.0, beta=others), student, teacher, targets)
    want = rows(losses.build("kd"), student, teacher)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.grad, want.grad)
    same = rows(losses.build("dkd"), student, student, targets)
    assert same.loss.abs().max() < 1e-13
    assert same.grad.abs().max() < 1e-13


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_taid_target_is_a_power_mean(power):
    student, teacher, _ = logits(3, 47)
    loss = losses.build("taid", t_start=0.3, power=power)
    p, q = teacher.softmax(-1), student.softmax(-1)
    mean = q**0.7 * p**0.3 if power == 0.0 else (0.7 * q**power + 0.3 * p**power) ** (1 / power)
    mean = mean / mean.sum(-1, keepdim=True)
    torch.testing.assert_close(rows(loss, student, teacher).grad, q - mean)
    torch.testing.assert_close(rows(loss, student, teacher).loss, (mean * (mean / q).log()).sum(-1))


def test_jsd_is_symmetric_when_the_roles_change():
    student, teacher, _ = logits(3, 47)
    one = rows(losses.build("jsd", beta=0.2), student, teacher).loss
    torch.testing.assert_close(rows(losses.build("jsd", beta=0.8), teacher, student).loss, one)


def test_taid_signals_are_the_kl_the_cross_entropy_and_the_targets_entropy():
    loss = make("taid")
    student, teacher, _ = logits(3, 47)
    result = rows(loss, student, teacher)
    p = (0.7 * student + 0.3 * teacher).softmax(-1)
    torch.testing.assert_close(result.signals["cross_entropy"], -(p * student.log_softmax(-1)).sum(-1))
    torch.testing.assert_close(result.signals["kl"], result.loss)
    told = rows(losses.build("taid", t_start=0.3, schedule="linear", target_entropy=True), student, teacher)
    assert list(told.signals) == ["kl", "target_entropy"]
    torch.testing.assert_close(told.signals["target_entropy"], -(p * p.log()).sum(-1))
    # Over another divergence the KL is still the signal; the entropy is read by the schedule `paper` alone.
    other = rows(make("taid over jsd"), student, teacher)
    assert list(other.signals) == ["kl"]
    want = rows(losses.build("taid", t_start=0.4), student, teacher)
    torch.testing.assert_close(other.signals["kl"], want.loss)


@pytest.mark.parametrize("name", EVERY)
def test_tokens_outside_the_vocabulary_change_nothing(name):
    loss = make(name)
    student, teacher, targets = logits(3, 47)
    want = rows(loss, student, teacher, targets)
    padding = torch.full((3, 5), -math.inf, dtype=torch.float64)
    wide = torch.cat([student, padding], 1).requires_grad_(), torch.cat([teacher, padding], 1)
    (by_autograd,) = torch.autograd.grad(loss(*wide, targets).sum(), wide[0])
    got = rows(loss, wide[0].detach(), wide[1], targets)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-13, atol=1e-14)
    for gradient in (got.grad, by_autograd):
        torch.testing.assert_close(gradient[:, :47], want.grad, rtol=1e-11, atol=1e-14)
        assert torch.equal(gradient[:, 47:], torch.zeros_like(padding))
    for key, value in want.signals.items():
        torch.testing.assert_close(got.signals[key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_opposed_logits_of_80_stay_finite(name, dtype):
    student = torch.tensor([[80.0, -80.0, 0.0, -80.0], [-80.0, 80.0, 80.0, 79.0]], dtype=dtype)
    result = rows(make(name), student, -student, torch.tensor([1, 0]))
    assert result.loss.isfinite().all()
    assert result.grad.isfinite().all()


def test_a_token_that_one_model_rules_out():
    student, teacher, _ = logits(3, 47)
    ruled_out = teacher.clone()
    ruled_out[:, 4] = -math.inf
    infinite = (
        "reverse_kl",
        "adaptive_kl",
        "taid over adaptive",
        "todi",
        "taid over todi",
        "alpha_beta on",
        "alpha_beta where",
    )
    for name in [n for n in DIVERGENCES if not n.startswith(infinite)]:
        if name == "taid of probabilities":
            continue  # finite too, but not by rounding: its target is 0 nowhere that q is not
        result = rows(make(name), student, ruled_out)
        assert result.loss.isfinite().all(), name
        assert result.grad.isfinite().all(), name
    for name in ("reverse_kl", "todi", "alpha_beta on the other axis", "alpha_beta where the sum is 0"):
        assert rows(make(name), student, ruled_out).loss.isinf().all(), name
    assert rows(make("forward_kl"), ruled_out, teacher).loss.isinf().all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_is_never_hidden(name, side):
    if (name, side) == ("taid at 0", 1):
        pytest.skip("at t = 0 the teacher has no share")
    both = list(logits(3, 47, torch.float32)[:2])
    both[side] = both[side].clone()
    both[side][1, 5] = math.nan
    result = rows(make(name), *both)
    assert result.loss.isnan().tolist() == [False, True, False]


def test_taid_at_0_does_not_read_the_teacher():
    student, teacher, _ = logits(3, 47)
    result = rows(make("taid at 0"), student, torch.full_like(teacher, -math.inf))
    assert result.loss.abs().max() == 0


def test_a_loss_without_a_closed_form_gets_its_gradient_from_autograd():
    class SquaredGap(DistillationLoss):
        def forward(self, student_logits, teacher_logits, targets=None):
            return (student_logits - teacher_logits).square().sum(-1)

    student, teacher, _ = logits(3, 47)
    with torch.no_grad():
        result = SquaredGap().loss_and_grad(student, teacher, grad=True)
        assert SquaredGap().loss_and_grad(student, teacher, grad=False).grad is None
    torch.testing.assert_close(result.grad, 2 * (student - teacher))
    assert not result.loss.requires_grad
    assert not student.requires_grad


@pytest.mark.parametrize("name", [*losses.available(DistillationLoss), "taid linear", "taid over jsd"])
def test_scratch_is_what_rows_needs(name, benchmark_losses, monkeypatch):
    loss = make(name)
    if name == "uld":  # whose NumPy buffers, as large, torch's allocator does not see
        monkeypatch.setattr("vlm_distill.losses.uld._ascending", lambda x: x.sort(-1).values)
        monkeypatch.setattr("vlm_distill.losses.uld._order", lambda x: x.argsort(-1))
    student, teacher, targets = logits(64, 1000, torch.float32)
    peak = benchmark_losses.peak_bytes(lambda: loss.loss_and_grad(student, teacher, targets, grad=True))
    buffer = student.numel() * student.element_size()
    assert loss.scratch - 1 < peak / buffer < loss.scratch + 0.1


def test_missing_inputs_are_named():
    student, teacher, _ = logits(3, 7)
    with pytest.raises(ValueError, match="no teacher logits"):
        losses.build("forward_kl")(student, None)
    with pytest.raises(ValueError, match="no targets"):
        losses.build("cross_entropy")(student, teacher)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("tiad", {}, "no loss is called 'tiad' (did you mean 'taid'?); there are taid, forward_kl"),
        ("forward_kl", {"temperature": 0}, "loss forward_kl: temperature is 0; give a number above 0"),
        ("jsd", {"beta": 1.5}, "loss jsd: beta is 1.5; give a number from 0 to 1"),
        ("jsd", {"beta": "half"}, "loss jsd: beta is 'half'"),
        ("taid", {"t_start": True}, "loss taid: t_start is True"),
        ("taid", {"alpha": math.nan}, "loss taid: alpha is nan; give a number of 0 or more"),
        ("kd", {"temperature": 1.4e154}, "loss kd: temperature is 1.4e+154; give a number of at most 1e+18"),
        ("dkd", {"beta": 10**400}, "loss dkd: beta is 10000"),
        ("taid", {"t_start": 0.8, "t_end": 0.5}, "t_end = 0.5 lies below t_start = 0.8"),
        (
            "taid",
            {"schedule": "sine"},
            "loss taid: schedule is 'sine' (did you mean 'cosine'?)",
        ),
        ("taid", {"divergence": "kl"}, "loss taid: divergence is 'kl'; it must be one of forward_kl"),
        ("taid", {"divergence": {"name": "tvd", "temperature": 2}}, "divergence tvd takes no temperature of its own"),
        ("alpha_beta", {"alpha": 3}, "loss alpha_beta: alpha is 3; give a number from -2 to 2"),
        ("alpha_beta", {"beta": "x"}, "loss alpha_beta: beta is 'x'; give a number from -2 to 2"),
        (
            "alpha_beta",
            {"alpha": -1, "beta": 0, "convention": "authors"},
            "give a negative divergence; leave convention",
        ),
        ("amid", {"mix": 0}, "loss amid: mix is 0; give a number above 0"),
        ("amid", {"mix": 1}, "loss amid: mix is 1, and r would be the teacher alone"),
        ("amid", {"order": "pq"}, "loss amid: order is 'pq'"),
        ("amid", {"hold": True}, "loss amid: with hold, order pr has no gradient; give order qr or rq"),
        ("skew_reverse_kl", {"hold": 1}, "loss skew_reverse_kl: hold is 1; give true or false"),
        ("skew_forward_kl", {"hold": True}, "loss skew_forward_kl has no parameter 'hold'"),
        ("jsd", {"convention": "trl"}, "loss jsd: convention is 'trl'; it must be one of paper, limit"),
        ("skew_forward_kl", {"alpha": 0}, "loss skew_forward_kl: alpha is 0; give a number above 0"),
        ("taid", {"t_strat": 0.4}, "loss taid has no parameter 't_strat' (did you mean 't_start'?)"),
        (
            "taid",
            {"divergence": {"name": "jsd", "bta": 0.1}},
            "jsd has no parameter 'bta' (did you mean 'beta'?)",
        ),
        (
            "taid",
            {"divergence": {"name": "jsd", "beta": 2}},
            "loss taid: divergence jsd: beta is 2; give a number",
        ),
        ("taid", {"divergence": {"name": "jsd", "beta": "x"}}, "loss taid: divergence jsd: beta is 'x'; give a number"),
        ("taid", {"divergence": "forwardkl"}, "divergence is 'forwardkl' (did you mean 'forward_kl'?)"),
        ("taid", {"divergence": {"beta": 0.1}}, "loss taid: divergence has no name; give it as in {name: jsd"),
        ("taid", {"divergence": 5}, "loss taid: divergence is 5; give a name, or a mapping with a name"),
        ("taid", {"divergence": ["jsd"]}, "loss taid: divergence is ['jsd']; give a name, or a mapping"),
        (
            "taid",
            {"divergence": {"name": "adaptive_kl", "mu": None}},
            "divergence adaptive_kl: mu is None",
        ),
        ("taid", {"schedule": "liner"}, "schedule is 'liner' (did you mean 'linear'?)"),
        (
            "taid",
            {"schedule": {"name": "linear"}},
            "loss taid: schedule is {'name': 'linear'}; it must be one",
        ),
        ("taid", {"target_entropy": "yes"}, "loss taid: target_entropy is 'yes'; give true or false"),
        ("kd", {"temprature": 4}, "loss kd has no parameter 'temprature' (did you mean 'temperature'?)"),
        ("kd", {"temperature": [4]}, "loss kd: temperature is [4]; give a number above 0"),
        ("kd", {"temperature": True}, "loss kd: temperature is True; give a number above 0"),
        ("jsd", {"convention": ["paper"]}, "loss jsd: convention is ['paper']; it must be one of paper, limit"),
        ("ctkd", {"decay": -1}, "loss ctkd: decay is -1; give two numbers"),
        ("ctkd", {"decay": [0]}, "loss ctkd: decay is [0]; give two numbers"),
        ("ctkd", {"decay": [0, "x"]}, "loss ctkd: decay is 'x'; give a number"),
        ("ctkd", {"decay": [0, -1], "grl_coefficient": -1}, "give one of them"),
        ("ctkd", {"instance": "yes"}, "loss ctkd: instance is 'yes'; give true or false"),
        ("hidden_states", {"layers": [4]}, "loss hidden_states: layers is [4]"),
        ("minilm", {"relation_heads": 0.5}, "loss minilm: relation_heads is 0.5"),
        ("cross_entropy", {"temperature": 2}, "loss cross_entropy has no parameter 'temperature'; it has none"),
    ],
)
def test_mistakes_get_one_line(name, params, message):
    with pytest.raises(LossError) as caught:
        losses.build(name, **params)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("registry", [losses.REGISTRY, vision_losses.REGISTRY], ids=["tokens", "classes"])
def test_what_is_known_without_torch_is_what_the_classes_say(registry):
    for name, entry in registry.entries.items():
        kind = entry.load()
        assert entry.parameters == tuple(inspect.signature(kind).parameters), name
        assert entry.summary() == inspect.getdoc(kind).splitlines()[0], name
        assert entry.needs == kind.needs, name
        assert (entry.parameters, entry.matches) == (Entry.of(kind).parameters, Entry.of(kind).matches), name
        assert not entry.compares or issubclass(kind, Divergence), name


def test_available_describes_each_loss():
    lines = losses.available()
    features = losses.available(losses.FeatureLoss)
    others = {"alm", "overlap_kl", "policy_gradient", "diagnostics"}
    assert set(lines) == {name.split()[0] for name in EVERY} | others | set(features)
    assert all(len(line) > 20 for line in lines.values())
    for name in lines:
        losses.build(name)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_taid_over_tvd_has_no_gradient_where_both_models_agree(power):
    student = logits(8, 4096, torch.float32)[0]
    loss = make("taid", {"divergence": "tvd", "power": power, "schedule": "linear"})
    assert not rows(loss, student, student).grad.any()
