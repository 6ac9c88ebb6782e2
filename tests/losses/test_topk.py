"""Top-k teachers: the tail is one more category, in every loss that supports it."""

import math

import pytest
import torch

from vlm_distill import losses
from vlm_distill.losses import Term, TopKTargets, fused_linear
from vlm_distill.losses.topk import SCRATCH, topk_loss_and_grad
from vlm_distill.models.lm_head import LMHead

N, V = 5, 23
TAKES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "skew_forward_kl": {},
    "skew_reverse_kl": {},
    "skew_reverse_kl held": {"hold": True},
    "alpha_beta": {},
    "alpha_beta on an axis": {"alpha": 0.5, "beta": 0.0},
    "todi": {},
    "amid": {},
    "tvd": {},
    "adaptive_kl": {},
    "kd": {"temperature": 1.0},
    "taid": {},
    "taid over tvd": {"divergence": "tvd", "schedule": "linear"},
    "taid of probabilities": {"power": 1.0},
    "taid at 0": {"t_start": 0.0},
    "taid at 1": {"t_start": 1.0},
}


def make(name):
    return losses.build(name.split()[0], **TAKES[name])


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2)]


def rows(loss, student, top, grad=True):
    return topk_loss_and_grad(
        loss, student.clone(), top.ids, top.log_probs(torch.arange(len(student)), student.dtype), grad=grad
    )


def by_hand(loss, student, top):
    """Compute the same from probabilities summed over the tail, by autograd."""
    q = student.softmax(-1)
    own = q.gather(-1, top.ids)
    log_q = torch.cat([own, 1 - own.sum(-1, keepdim=True)], -1).log()
    return loss.loss_over_categories(torch.cat([top.logprobs, top.tail.unsqueeze(-1)], -1), log_q)


@pytest.mark.parametrize("k", [1, 4, V - 1])
@pytest.mark.parametrize("name", TAKES)
def test_values_signals_and_gradients(name, k, logits):
    student, teacher = logits
    loss, top, leaf = make(name), TopKTargets.of(teacher, k), student.clone().requires_grad_()
    values, signals = by_hand(loss, leaf, top)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    result, without = rows(loss, student, top), rows(loss, student, top, grad=False)
    torch.testing.assert_close(result.loss, values.detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(result.grad, gradient, rtol=1e-9, atol=1e-13)
    assert without.grad is None
    assert torch.equal(without.loss, result.loss)
    assert set(result.signals) == set(loss.signals)
    for key, value in signals.items():
        torch.testing.assert_close(result.signals[key], value.detach(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", TAKES)
def test_all_tokens_known_is_the_whole_distribution(name, logits):
    student, teacher = logits
    loss = make(name)
    result = rows(loss, student, TopKTargets.of(teacher, V))
    want = loss.loss_and_grad(student.clone(), teacher.clone(), grad=True)
    torch.testing.assert_close(result.loss, want.loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(result.grad, want.grad, rtol=1e-10, atol=1e-13)
    for key, value in want.signals.items():
        torch.testing.assert_close(result.signals[key], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", TAKES)
def test_the_tail_counts(name, logits):
    """A student that agrees on the k tokens only up to a factor has not reached its teacher."""
    _, teacher = logits
    loss, top = make(name), TopKTargets.of(teacher, 4)
    same = rows(loss, teacher, top)
    assert same.loss.abs().max() < 1e-13
    if "tvd" not in name:  # which has no derivative there
        assert same.grad.abs().max() < 1e-13
    raised = teacher.scatter_add(-1, top.ids, torch.ones(N, 4, dtype=torch.float64))
    if name != "taid at 0":
        assert rows(loss, raised, top).loss.min() > 1e-3


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "taid"])
def test_a_student_without_mass_in_the_tail(name):
    student = torch.full((1, V), -80.0)
    student[0, 3] = 80.0
    result = rows(make(name), student, TopKTargets.of(torch.zeros(1, V).index_fill(-1, torch.tensor([3]), 2.0), 1))
    assert result.loss.isfinite().all()
    assert result.grad.isfinite().all()


def test_losses_that_need_more_say_so(logits):
    student, teacher = logits
    linear = torch.nn.Linear(V, V, bias=False, dtype=torch.float64)
    top = TopKTargets.of(teacher, 4)
    for loss in (losses.build("dkd"), losses.build("kd"), losses.build("forward_kl", temperature=2.0)):
        with pytest.raises(ValueError, match="needs the teacher's whole distribution"):
            fused_linear(loss, student, LMHead(linear), top, torch.zeros(N, dtype=torch.long))
    with pytest.raises(ValueError, match="the student has 4 rows, the teacher 5"):
        fused_linear(losses.build("taid"), student[:4], LMHead(linear), top)


@pytest.mark.parametrize("chunk_bytes", [1, None])
def test_through_the_engine(chunk_bytes, logits):
    hidden, teacher = logits
    linear = torch.nn.Linear(V, V, dtype=torch.float64)
    targets, distilled = torch.arange(N), torch.tensor([True, True, False, True, False])
    terms = [Term("taid", losses.build("taid")), Term("data", losses.build("cross_entropy"), 0.3)]
    top, leaf = TopKTargets.of(teacher, 4), hidden.clone().requires_grad_()
    sums = fused_linear(terms, leaf, LMHead(linear), top, targets, distilled=distilled, chunk_bytes=chunk_bytes)
    student = linear(leaf)
    known = TopKTargets(top.ids[distilled], top.logprobs[distilled], top.tail[distilled])
    want = by_hand(terms[0].loss, student[distilled], known)[0].sum()
    want = want + 0.3 * terms[1].loss(student, None, targets).sum()
    torch.testing.assert_close(sums.loss, want)
    inputs = [leaf, linear.weight, linear.bias]
    torch.testing.assert_close(torch.autograd.grad(sums.loss, inputs), torch.autograd.grad(want, inputs))


def test_scratch_is_what_it_needs(benchmark_losses):
    student, top = torch.randn(64, 1000), TopKTargets.of(torch.randn(64, 1000), 4)
    peak = benchmark_losses.peak_bytes(lambda: rows(losses.build("taid"), student, top))
    copy = 1  # `rows` above copies the logits
    assert SCRATCH - 1 < peak / (student.numel() * 4) - copy < SCRATCH + 0.1


def test_the_targets_of_logits():
    top = TopKTargets.of(torch.tensor([[0.0, math.log(2.0), math.log(5.0), -math.inf]]), 2)
    assert top.ids.tolist() == [[2, 1]]
    torch.testing.assert_close(top.logprobs.exp(), torch.tensor([[5 / 8, 2 / 8]]))
    torch.testing.assert_close(top.tail.exp(), torch.tensor([1 / 8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["tvd", "taid over tvd"])
def test_a_teacher_equal_to_the_student_gives_tvd_no_gradient(name, dtype):
    logits = 8 * torch.randn(16, 4096, generator=torch.Generator().manual_seed(3), dtype=dtype)
    result = rows(make(name), logits, TopKTargets.of(logits, 64))
    assert not result.grad.any()
    assert not result.loss.any()
