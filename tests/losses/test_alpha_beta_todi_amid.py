"""The alpha-beta divergence, ToDi, AMiD and the held skew against definitions of their own, and their special cases."""

import mpmath
import pytest
import torch

from vlm_distill import losses


def logits(n=7, v=41, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def rows(name, student, teacher, **params):
    return losses.build(name, **params).loss_and_grad(student.clone(), teacher.clone(), grad=True)


def same(got, want, rtol=1e-10, atol=1e-13):
    torch.testing.assert_close(got.loss, want.loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.grad, want.grad, rtol=rtol, atol=atol)


def kl(a, b):
    return (a * (a / b).log()).sum(-1)


def alpha_beta(p, q, a, b):
    """The divergence and its four limits, as published."""
    if a == 0 and b == 0:
        return 0.5 * (q.log() - p.log()).square().sum(-1)
    if b == 0:
        return (p**a * (p**a / q**a).log() - p**a + q**a).sum(-1) / a**2
    if a == 0:
        return (q**b * (q**b / p**b).log() - q**b + p**b).sum(-1) / b**2
    if a + b == 0:
        return ((q**a / p**a).log() + (p / q) ** a - 1).sum(-1) / a**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def mean(p, q, alpha, mix):
    c = (1 - alpha) / 2
    logarithm = mix * p.log() + (1 - mix) * q.log() if c == 0 else (mix * p**c + (1 - mix) * q**c).log() / c
    return logarithm.softmax(-1)


def amid(p, q, alpha, mix, order, hold):
    named = {"p": p, "q": q, "r": mean(p, q.detach() if hold else q, alpha, mix)}
    return kl(named[order[0]], named[order[1]])


def todi(p, q):
    share = (p / (p + q)).detach()
    return (share * p * (p / q).log() + (1 - share) * q * (q / p).log()).sum(-1)


def held_skew(p, q):
    return kl(q, 0.9 * p + 0.1 * q.detach())


EXPONENTS = [(0.2, 0.7), (1.0, 0.5), (-0.4, 0.9), (0.6, 0.0), (0.0, 0.6), (0.5, -0.5), (0.0, 0.0), (1.0, 1.0)]
CASES = [("alpha_beta", {"alpha": a, "beta": b}, lambda p, q, a=a, b=b: alpha_beta(p, q, a, b)) for a, b in EXPONENTS]
CASES += [("todi", {}, todi), ("skew_reverse_kl", {"hold": True}, held_skew)]
for _alpha, _order, _hold in [
    (0.5, "pr", False),
    (-3.0, "rp", False),
    (1.0, "qr", False),
    (5.0, "rq", False),
    (0.5, "qr", True),
    (1.0, "rq", True),
]:
    _params = {"alpha": _alpha, "mix": 0.3, "order": _order, "hold": _hold}
    CASES.append(("amid", _params, lambda p, q, params=_params: amid(p, q, **params)))


@pytest.mark.parametrize(("name", "params", "definition"), CASES, ids=lambda x: str(x) if isinstance(x, dict) else None)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_published_formula(name, params, definition, temperature):
    student, teacher = logits()
    leaf = student.clone().requires_grad_()
    values = definition((teacher / temperature).softmax(-1), (leaf / temperature).softmax(-1))
    got = rows(name, student, teacher, temperature=temperature, **params)
    torch.testing.assert_close(got.loss, values.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.grad, torch.autograd.grad(values.sum(), leaf)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("small", [1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("direction", [(0.2, 1), (1, 0.2), (1, 1), (1, -0.5), (0.0, 1)], ids=str)
@pytest.mark.parametrize("base", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.7), (0.5, -0.5)], ids=str)
def test_float32_keeps_its_digits_near_the_axes(base, direction, small):
    a, b = (start + small * step for start, step in zip(base, direction, strict=True))
    student, teacher = logits(3, 17, torch.float32)
    got = rows("alpha_beta", student, teacher, alpha=a, beta=b)
    p, q = (x.double().softmax(-1) for x in (teacher, student))
    with mpmath.workdps(60):
        exact = [alpha_beta_of_row(p[n].tolist(), q[n].tolist(), mpmath.mpf(a), mpmath.mpf(b)) for n in range(3)]
    torch.testing.assert_close(got.loss.double(), torch.tensor([x for x, _ in exact]).double(), rtol=2e-5, atol=1e-6)
    slopes = torch.tensor([x for _, x in exact]).double()
    gradient = slopes - q * slopes.sum(-1, keepdim=True)
    torch.testing.assert_close(got.grad.double(), gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def alpha_beta_of_row(p, q, a, b):
    """The divergence of a row and q·dD/dq, as floats."""
    value, slopes = mpmath.mpf(0), []
    for x, y in zip(map(mpmath.mpf, p), map(mpmath.mpf, q), strict=True):
        if a == 0:
            value += (y**b * mpmath.log(y**b / x**b) - y**b + x**b) / b**2
            slopes.append(float(y**b * mpmath.log(y / x)))
        elif a + b == 0:
            value += (mpmath.log(y**a / x**a) + (x / y) ** a - 1) / a**2
            slopes.append(float((1 - (x / y) ** a) / a))
        else:
            value -= (x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b)) / (a * b)
            slopes.append(float((y ** (a + b) - x**a * y**b) / a))
    return float(value), slopes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("alpha_beta", {"alpha": 1.0, "beta": 0.0}), ("forward_kl", {})),
        (("alpha_beta", {"alpha": 0.0, "beta": 1.0}), ("reverse_kl", {})),
        (("alpha_beta", {"alpha": 1.0, "beta": 0.0, "convention": "authors"}), ("forward_kl", {})),
        (("amid", {"alpha": -1.0, "mix": 0.1, "order": "pr"}), ("skew_forward_kl", {})),
        (("amid", {"alpha": -1.0, "mix": 0.9, "order": "qr"}), ("skew_reverse_kl", {})),
        (("amid", {"alpha": -1.0, "mix": 0.9, "order": "qr", "hold": True}), ("skew_reverse_kl", {"hold": True})),
        (("amid", {"alpha": 1.0, "mix": 0.4, "order": "rq", "hold": True}), ("taid", {"t_start": 0.4})),
        (("amid", {"mix": 0.4, "order": "rq", "hold": True}), ("taid", {"t_start": 0.4, "power": 0.25})),
    ],
    ids=str,
)
def test_special_cases_are_other_losses(one, other):
    student, teacher = logits()
    same(rows(one[0], student, teacher, **one[1]), rows(other[0], student, teacher, **other[1]))


@pytest.mark.parametrize(("a", "b", "factor"), [(0.2, 0.0, 0.2), (0.0, 0.7, 0.7), (0.5, -0.5, 0.5), (0.2, 0.7, 1.0)])
def test_by_the_authors_convention_the_limits_have_a_factor(a, b, factor):
    student, teacher = logits()
    plain = rows("alpha_beta", student, teacher, alpha=a, beta=b)
    theirs = rows("alpha_beta", student, teacher, alpha=a, beta=b, convention="authors")
    torch.testing.assert_close(theirs.loss, factor * plain.loss)
    torch.testing.assert_close(theirs.grad, factor * plain.grad)
