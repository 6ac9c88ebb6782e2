"""The torch kernels against the losses' definitions; the Triton kernels against the torch kernels."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vlm_distill import losses
from vlm_distill.losses.kernels import RowStatistics, loss_and_grad, torch_kernels

LOSSES = {
    "forward_kl": {},
    "forward_kl at T": {"temperature": 2.5},
    "reverse_kl": {},
    "reverse_kl at T": {"temperature": 0.5},
    "jsd": {},
    "jsd at T": {"beta": 0.1, "temperature": 3.0},
    "jsd by the limit": {"beta": 1.0, "convention": "limit"},
    "skew_forward_kl": {},
    "skew_forward_kl at T": {"alpha": 0.7, "temperature": 2.0},
    "skew_reverse_kl": {},
    "skew_reverse_kl at T": {"alpha": 0.7, "temperature": 2.0},
    "skew_reverse_kl held": {"hold": True},
    "alpha_beta": {},
    "alpha_beta at T": {"alpha": 0.9, "beta": 0.3, "temperature": 2.0},
    "todi": {},
    "todi at T": {"temperature": 2.0},
    "tvd": {},
    "kd": {"temperature": 2.0},
    "taid": {"t_start": 0.3},
    "taid at 0": {"t_start": 0.0},
    "taid at 1": {"t_start": 1.0},
    "taid over reverse_kl": {"divergence": "reverse_kl"},
    "taid over jsd": {"divergence": {"name": "jsd", "beta": 0.2}},
    "taid over tvd": {"divergence": "tvd"},
    "taid over alpha_beta": {"divergence": "alpha_beta"},
    "taid adaptive": {"schedule": "adaptive", "target_entropy": True},
    "cross_entropy": {},
}
INFINITE = ("reverse_kl", "taid over reverse_kl", "jsd by the limit", "todi")
FINITE = [name for name in LOSSES if not name.startswith(INFINITE)]


def make(name):
    return losses.build(name.split()[0], **LOSSES[name])


def logits(n, v, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(n + v)
    student, teacher = (3 * torch.randn(n, v, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(device, dtype), teacher.to(device, dtype), torch.randint(v, (n,), generator=generator).to(device)


def defined(loss, student, teacher, targets):
    """Compute loss and gradient by the definition, in float64."""
    leaf = student.double().clone().requires_grad_()
    value = loss(leaf, teacher.double(), targets)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def streamed(loss, student, teacher, targets=None, tile=None, engine=None, out=None, **options):
    """Compute loss, gradient and signals by the kernels, from tiles of ``tile`` columns."""
    form = loss.kernel_form()
    statistics = RowStatistics(form, len(student), student)
    if engine is not None:
        statistics._engine = engine
    tile = tile or student.shape[1]
    out = torch.empty_like(student) if out is None else out
    tiles = []
    for start in range(0, student.shape[1], tile):
        part = slice(start, start + tile)
        tiles.append((student[:, part], teacher[:, part], out[:, part], None if targets is None else targets - start))
    for s, t, _, right in tiles:
        statistics.accumulate(s, t, right)
    statistics.finalize()
    if form.mixed:
        for s, t, _, _ in tiles:
            statistics.accumulate_mixture(s, t)
    for s, t, o, right in tiles:
        statistics.gradient(s, t, o, right, **options)
    return statistics.loss(), out, statistics.signals()


def close(got, want, rtol=5e-6, atol=5e-6):
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=rtol, atol=atol)
    largest = want[1].abs().max().item()
    torch.testing.assert_close(got[1].double(), want[1].double(), rtol=0, atol=2 * rtol * largest + atol / 10)


@pytest.mark.parametrize("shape", [(3, 47), (31, 123), (1, 7)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_definition(name, shape):
    loss = make(name)
    student, teacher, targets = logits(*shape)
    close(streamed(loss, student, teacher, targets), defined(loss, student, teacher, targets))


@pytest.mark.parametrize("tile", [1, 16, 40, 123])
@pytest.mark.parametrize("name", LOSSES)
def test_any_tiles(name, tile):
    loss = make(name)
    student, teacher, targets = logits(5, 123)
    got = streamed(loss, student, teacher, targets, tile)
    close(got, defined(loss, student, teacher, targets))
    if name != "cross_entropy":
        for key, value in loss.loss_and_grad(student.clone(), teacher.clone(), targets, grad=False).signals.items():
            torch.testing.assert_close(got[2][key], value, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_torch_kernels_are_exact_in_float64(name):
    loss = make(name)
    student, teacher, targets = logits(5, 123, torch.float64)
    want = defined(loss, student, teacher, targets)
    close(streamed(loss, student, teacher, targets, 50), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_opposed_logits_of_80(name):
    loss = make(name)
    student = torch.tensor([[80.0, -80.0, 0.0, -80.0], [-80.0, 80.0, 80.0, 79.0]])
    targets = torch.tensor([1, 0])
    for tile in (4, 2, 1):
        # The losses are in the hundreds, and reverse KL's gradient is a difference of such numbers.
        close(streamed(loss, student, -student, targets, tile), defined(loss, student, -student, targets), atol=5e-4)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cross_entropy"])
def test_equal_inputs_are_alike(name):
    student, _, _ = logits(5, 123)
    loss, gradient, _ = streamed(make(name), student, student, tile=50)
    torch.testing.assert_close(loss, torch.zeros(5), rtol=0, atol=1e-6)
    if name != "taid over tvd":  # whose mixture is rounded, and whose gradient jumps where p = q
        torch.testing.assert_close(gradient, torch.zeros_like(student), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_ties(name):
    """Few distinct values, so that many tokens share the maximum, in one model and in both."""
    loss = make(name)
    student, teacher, targets = logits(5, 123)
    student, teacher = student.round(), teacher.round()
    close(streamed(loss, student, teacher, targets, 50), defined(loss, student, teacher, targets))


@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_keep_their_precision(name):
    """The models' logits are far from 0 and from one another."""
    loss = make(name)
    student, teacher, targets = logits(5, 123)
    student, teacher = (student * 1024).round() / 1024, (teacher * 1024).round() / 1024
    if name not in ("taid", "taid over jsd", "taid over reverse_kl", "taid over tvd"):  # their mixture is rounded
        student, teacher = student + 512, teacher - 256
    close(streamed(loss, student, teacher, targets, 50), defined(loss, student, teacher, targets), atol=1e-5)


@pytest.mark.parametrize("tile", [60, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_tokens_outside_the_vocabulary_add_nothing(name, tile):
    """−∞ in both models, including whole tiles at the front and at the end."""
    loss = make(name)
    student, teacher, targets = logits(3, 47)
    padding = torch.full((3, 6), -math.inf)
    wide = [torch.cat([padding, x, padding], 1) for x in (student, teacher)]
    got = streamed(loss, *wide, targets + 6, tile)
    want = defined(loss, student, teacher, targets)
    close((got[0], got[1][:, 6:-6]), want)
    assert torch.equal(got[1][:, :6], torch.zeros_like(padding))
    assert torch.equal(got[1][:, -6:], torch.zeros_like(padding))


@pytest.mark.parametrize("tile", [47, 4])
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cross_entropy"])
def test_a_token_that_the_teacher_rules_out(name, tile):
    loss = make(name)
    student, teacher, _ = logits(3, 47)
    teacher[:, :4] = -math.inf  # the whole of the first small tile
    got = streamed(loss, student, teacher, tile=tile)
    if name in FINITE:
        # Autograd cannot pass an infinite logit: a very small one has the same gradient.
        close(got, defined(loss, student, teacher.clamp(min=-1e9), None))
    else:
        assert got[0].isposinf().all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cross_entropy"])
def test_nan_is_never_hidden(name, side):
    if (name, side) == ("taid at 0", 1):
        pytest.skip("at t = 0 the teacher has no share")
    both = list(logits(3, 47)[:2])
    both[side][1, 5] = math.nan
    for tile in (47, 20):
        assert streamed(make(name), *both, tile=tile)[0].isnan().tolist() == [False, True, False]


def test_taid_at_0_does_not_read_the_teacher():
    student, _, _ = logits(3, 47)
    assert streamed(make("taid at 0"), student, torch.full_like(student, math.nan))[0].abs().max() < 1e-7


@pytest.mark.parametrize("name", ["taid", "jsd at T", "cross_entropy"])
def test_scale_sum_softcap_and_rounding_of_the_gradient(name):
    loss = make(name)
    student, teacher, targets = logits(5, 123)
    student = 4.0 * (student / 4.0).tanh()
    want = 0.3 * streamed(loss, student, teacher, targets)[1] * (1.0 - (student / 4.0) ** 2)
    got = streamed(loss, student, teacher, targets, 50, scale=0.3, softcap=4.0)[1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    start = torch.ones_like(student)
    streamed(loss, student, teacher, targets, 50, out=start, scale=0.3, softcap=4.0, add=True)
    torch.testing.assert_close(start, 1.0 + want, rtol=1e-6, atol=1e-6)
    rounded = torch.empty(5, 128, dtype=torch.bfloat16)[:, :123]
    streamed(loss, student, teacher, targets, 50, out=rounded, scale=0.3, softcap=4.0)
    torch.testing.assert_close(rounded.float(), want, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cross_entropy"])
def test_whole_rows_leave_the_gradient_in_the_students_memory(name):
    loss = make(name)
    student, teacher, _ = logits(5, 123)
    want = defined(loss, student, teacher, None)
    wide = torch.empty(5, 200)
    own = wide[:, :123].copy_(student)
    value, gradient, _ = loss_and_grad(loss.kernel_form(), own, teacher, grad=True)
    assert gradient.data_ptr() == wide.data_ptr()
    close((value, gradient), want)
    assert loss_and_grad(loss.kernel_form(), student, teacher, grad=False)[1] is None


def test_losses_that_need_whole_rows_say_so():
    whole = [losses.build("taid", power=1.0), losses.build("taid", divergence="adaptive_kl")]
    whole += [losses.build(name) for name in ("adaptive_kl", "dkd", "ctkd", "diagnostics")]
    assert [loss.kernel_form() for loss in whole] == [None] * len(whole)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_under_its_interpreter():
    """The interpreter must be chosen before Triton is imported, hence the process."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(33, 151_936), (64, 92_553), (1, 7), (300, 1000)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_triton_equals_torch_on_a_gpu(name, shape):
    loss = make(name)
    student, teacher, targets = logits(*shape, device="cuda")
    want = streamed(loss, student, teacher, targets, engine=torch_kernels)
    close(streamed(loss, student, teacher, targets), want, rtol=2e-5, atol=1e-5)
    close(streamed(loss, student, teacher, targets, -(-shape[1] // 3)), want, rtol=2e-5, atol=1e-5)
    exact = defined(loss, student, teacher, targets)
    close(want, exact, rtol=2e-5, atol=1e-5)
