"""TAID's schedules and state. test_golden compares trajectories with the released rule."""

import copy
import io
import itertools
import math

import pytest
import torch

from vlm_distill.losses import TAID, LossError, Progress
from vlm_distill.losses.taid_pace import Pace


def run(loss, signals, steps=None, start=0):
    """Return t after each update."""
    trajectory = []
    for step, signal in enumerate(signals, start):
        loss.update({"cross_entropy": signal}, Progress(step, steps or len(signals)))
        trajectory.append(loss.t)
    return trajectory


def falling(n):
    return [5 * math.exp(-3 * i / n) + 0.2 * math.sin(i) for i in range(n)]


def test_linear_is_the_line_whatever_the_loss():
    loss = TAID(t_start=0.2, t_end=0.8, schedule="linear")
    assert run(loss, [1.0, math.nan, 9.0, 0.0]) == pytest.approx([0.2, 0.35, 0.5, 0.65])


def test_the_first_update_only_stores_the_loss():
    loss = TAID(alpha=0.1)
    loss.update({"cross_entropy": 3.0}, Progress(0, 1000))
    assert loss.t == 0.4
    loss.update({"cross_entropy": 2.0}, Progress(1, 1000))
    momentum = 0.01 * (3 - 2) / 3
    assert loss.t == pytest.approx(0.4 + 0.1 / (1 + math.exp(-momentum)) * 0.6)


def test_paper_leads_the_line_and_never_falls():
    trajectory = run(TAID(alpha=0.02), falling(300))
    line = [0.4 + 0.6 * i / 300 for i in range(300)]
    assert all(a <= b for a, b in itertools.pairwise(trajectory))
    assert all(t >= on_line - 1e-15 for t, on_line in zip(trajectory, line, strict=True))
    assert max(t - on_line for t, on_line in zip(trajectory, line, strict=True)) > 0.1


def test_a_falling_loss_moves_t_faster_than_a_rising_one():
    fast, slow = TAID(alpha=0.02, beta=0.5), TAID(alpha=0.02, beta=0.5)
    run(fast, [2.0 ** (10 - i) for i in range(10)], steps=10**6)
    run(slow, [2.0**i for i in range(10)], steps=10**6)
    assert fast.t > slow.t


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "adaptive"])
def test_every_schedule_starts_at_t_start_ends_at_t_end_and_never_falls(schedule):
    loss = TAID(t_start=0.2, t_end=0.9, schedule=schedule)
    trajectory = [loss.t]
    for step in range(101):
        loss.update({"kl": 1.01 + math.sin(step), "slope": 2.0}, Progress(step, 100))
        trajectory.append(loss.t)
    assert trajectory[:2] == pytest.approx([0.2, 0.2], abs=0.03)
    assert trajectory[-1] == pytest.approx(0.9)
    assert all(a <= b for a, b in itertools.pairwise(trajectory))


def test_shapes_of_the_schedules():
    def half(schedule):
        return run(TAID(t_start=0.0, schedule=schedule), [1.0] * 51, steps=100)[-1]

    assert half("cosine") == pytest.approx(0.5)
    assert half("exponential") == pytest.approx((1 - math.exp(-1.5)) / (1 - math.exp(-3)))


def learn(speed, steps, noise=0.2, t_start=0.2, sharpness=2.0):
    """Return t over a run of a student that follows its target at some speed, its KL seen through noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    loss, teacher, student = TAID(t_start=t_start, schedule="adaptive"), sharpness * draw(16, 50), draw(16, 50)
    trajectory = []
    for step in range(steps):
        result = loss.loss_and_grad(student.clone(), teacher.clone(), grad=True)
        seen = math.exp(noise * draw(1).item())
        student = student - 50 * speed / steps * result.grad
        loss.update(
            {name: seen * signal.mean().item() for name, signal in result.signals.items()}, Progress(step, steps)
        )
        trajectory.append(loss.t)
    return trajectory


@pytest.mark.parametrize("steps", [300, 3000])
def test_adaptive_t_answers_to_the_student(steps):
    easy, hard, stalled = (learn(speed, steps) for speed in (10.0, 0.3, 0.0))
    line = [0.2 + 0.8 * (step + 1) / steps for step in range(steps)]
    middle, late = steps // 2, 3 * steps // 4
    assert easy[middle] > line[middle] + 0.2
    assert easy[middle] > hard[middle] + 0.1 > stalled[middle] + 0.15
    assert stalled[late] < line[late]
    for trajectory in (easy, hard, stalled):
        assert trajectory[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("t", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_slope_is_how_the_kl_grows_with_t(power, t):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 23, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = TAID(schedule="adaptive", power=power)

    def kl(value):
        loss.t = value
        return loss.loss_and_grad(student.clone(), teacher.clone(), grad=False).signals["kl"]

    # One-sided where t cannot go further.
    low, high = t * (1 - 1e-5), min(1.0, t * (1 + 1e-5))
    numeric = (kl(high) - kl(low)) / math.log(high / low)
    loss.t = t
    found = loss.loss_and_grad(student.clone(), teacher.clone(), grad=False).signals["slope"]
    torch.testing.assert_close(found, numeric, rtol=1e-3, atol=1e-6)
    _, signals = loss.loss_over_categories(teacher.log_softmax(-1), student.log_softmax(-1))
    torch.testing.assert_close(signals["slope"], found)


@pytest.mark.parametrize("sharpness", [2.0, 10.0])
def test_a_student_that_learns_nothing_shows_no_progress(sharpness):
    # The KL itself grows more than tenfold while t does, and KL/t² falls, the more the surer the teacher.
    pace, loss = Pace(), TAID(schedule="adaptive")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(16, 50, generator=generator) for scale in (1.0, sharpness))
    gaps = []
    for step in range(201):
        loss.t = 0.2 + 0.8 * step / 200
        signals = loss.loss_and_grad(student.clone(), teacher.clone(), grad=False).signals
        pace.after(signals["kl"].mean().item(), signals["slope"].mean().item(), loss.t, 10)
        gaps.append(signals["kl"].mean().item() * math.exp(-pace._by_t))
    assert gaps == pytest.approx([gaps[0]] * 201, rel=2e-3)


def test_adaptive_t_does_not_depend_on_the_number_of_steps():
    short, long = learn(0.3, 500, noise=0.0), learn(0.3, 5000, noise=0.0)
    assert long[::10] == pytest.approx(short, abs=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_never_enters(bad):
    signals = falling(60)
    clean, hurt = TAID(alpha=0.02), TAID(alpha=0.02)
    run(clean, signals[:30], 1000)
    run(hurt, signals[:30], 1000)
    before = hurt.get_extra_state()
    hurt.update({"cross_entropy": bad}, Progress(30, 1000))
    assert hurt.get_extra_state() == before
    adaptive = TAID(schedule="adaptive")
    adaptive.update({"kl": 1.0, "slope": 2.0}, Progress(0, 1000))
    state = adaptive.get_extra_state()["pace"]
    adaptive.update({"kl": bad, "slope": 2.0}, Progress(1, 1000))
    adaptive.update({"kl": 1.0, "slope": bad}, Progress(2, 1000))
    assert adaptive.get_extra_state()["pace"] == state
    assert run(hurt, signals[30:], 1000, 30) == run(clean, signals[30:], 1000, 30)


def test_t_follows_the_line_through_a_stretch_of_bad_steps():
    loss = TAID(t_start=0.0, alpha=0.0)
    assert run(loss, [math.nan] * 10) == pytest.approx([i / 10 for i in range(10)])


def test_a_step_without_signals_counts_as_non_finite():
    loss = TAID(t_start=0.0)
    loss.update({}, Progress(5, 10))
    assert loss.t == 0.5


def test_t_stays_at_t_end():
    loss = TAID(t_end=0.6, alpha=1.0)
    assert max(run(loss, falling(100))) == 0.6
    assert run(loss, [1.0], steps=10, start=50) == [0.6]


def test_forward_and_rows_do_not_move_t():
    loss = TAID(alpha=0.5)
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    state = loss.get_extra_state()
    for training in (True, False):
        loss.train(training)
        loss(student, teacher)
        loss.loss_and_grad(student.clone(), teacher.clone(), grad=training)
    assert loss.get_extra_state() == state
    assert loss.metrics() == {"t": 0.4}


def test_state_survives_a_checkpoint_and_a_cast_bit_for_bit():
    signals = falling(80)
    whole = TAID(alpha=0.02)
    trajectory = run(whole, signals)
    first = TAID(alpha=0.02)
    run(first, signals[:33], 80)
    first.bfloat16()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = TAID(alpha=0.02)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.half()
    assert run(second, signals[33:], 80, 33) == trajectory[33:]
    assert second.get_extra_state() == whole.get_extra_state()


def test_state_before_the_first_update_round_trips():
    fresh = TAID()
    other = TAID()
    run(other, falling(10))
    other.load_state_dict(copy.deepcopy(fresh.state_dict()))
    assert other.get_extra_state() == fresh.get_extra_state()


def test_t_can_be_set_within_its_range():
    loss = TAID()
    loss.t = 1
    assert loss.t == 1.0
    with pytest.raises(LossError, match=r"loss taid: t is 1\.2; give a number from 0 to 1"):
        loss.t = 1.2
