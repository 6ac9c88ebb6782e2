"""Losses that treat each answer as a whole: means over answers, and the adaptive α of DistiLLM-2."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from vlm_distill import losses
from vlm_distill.losses import HiddenTargets, LossError, Progress, Term, TokenGroups, TopKTargets

# Answers of 3, 1 and 4 tokens; the last token of the first is not compared.
ANSWERS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
COMPARED = torch.tensor([True, True, False, True, True, True, True, True])


class Head:
    scale, softcap, bias = 1.0, None, None

    def __init__(self, weight):
        self._weight = weight

    def weight(self):
        return nullcontext(self._weight)


@pytest.fixture
def models():
    torch.manual_seed(3)
    hidden = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    head, other = (torch.randn(11, 6, dtype=torch.float64) for _ in range(2))
    return hidden, Head(head), HiddenTargets(torch.randn(8, 6, dtype=torch.float64), Head(other)), torch.arange(8)


def mean_of_answers(rows, compared):
    """The mean over answers of the mean over each answer's compared tokens."""
    means = [rows[(number == ANSWERS) & compared].mean() for number in ANSWERS.unique()]
    return torch.stack(means).mean()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_mean_over_answers_beside_one_over_tokens(models, recompute):
    hidden, head, teacher, targets = models
    kl = Term("kl", losses.build("forward_kl"), 2.0, mean="sequences")
    right = Term("right", losses.build("cross_entropy"), mean="sequences")
    plain = Term("plain", losses.build("reverse_kl"))
    weighted = [
        replace(kl, row_weights=losses.sequence_weights(ANSWERS, COMPARED)),
        replace(right, row_weights=losses.sequence_weights(ANSWERS)),
        plain,
    ]
    scales = {"kl": 1 / 3, "right": 1 / 3, "plain": 1 / 7}
    sums = losses.fused_linear(
        weighted,
        hidden,
        head,
        teacher,
        targets,
        distilled=COMPARED,
        scales=scales,
        chunk_bytes=600,
        recompute=recompute,
    )
    (found,) = torch.autograd.grad(sums.loss, hidden)

    x, y = hidden @ head._weight.T, teacher.hidden @ teacher.head._weight.T
    expected = 2 * mean_of_answers(kl.loss(x, y), COMPARED)
    expected = expected + mean_of_answers(right.loss(x, None, targets), COMPARED | True)
    expected = expected + plain.loss(x, y)[COMPARED].mean()
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, hidden)[0])
    assert float(sums.terms["kl"].count) == float(sums.terms["right"].count) == 3.0
    assert sums.terms["plain"].count == 7
    torch.testing.assert_close(sums.terms["kl"].loss / 3, mean_of_answers(kl.loss(x, y), COMPARED))


def test_groups_and_likeliest_tokens_count_once_for_their_answer(models):
    hidden, head, teacher, targets = models
    x, y = hidden @ head._weight.T, teacher.hidden @ teacher.head._weight.T
    spans = torch.tensor([[0, 2], [3, 4], [4, 5], [5, 8]])
    groups = TokenGroups(spans, spans, targets)
    alm = losses.build("alm", tau=3.0)
    term = Term("alm", alm, row_weights=losses.sequence_weights(ANSWERS, groups))
    sums = losses.fused_linear([term], hidden, head, teacher, targets, distilled=groups)
    expected = (torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64) * alm(x, y, targets, groups)).sum()
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (sums.loss, expected)))
    assert float(sums.terms["alm"].count) == 3.0

    kl = Term("kl", losses.build("forward_kl"), row_weights=losses.sequence_weights(ANSWERS))
    everything = TopKTargets.of(y, 11)
    sums = losses.fused_linear([kl], hidden, head, everything)
    torch.testing.assert_close(sums.loss / 3, mean_of_answers(kl.loss(x, y), COMPARED | True))


@pytest.mark.parametrize(
    ("name", "options"),
    [("skew_forward_kl", {}), ("skew_reverse_kl", {}), ("skew_reverse_kl", {"hold": True})],
)
def test_each_answer_has_its_own_alpha(models, name, options):
    hidden, head, teacher, targets = models
    loss = losses.build(name, alpha=0.3, adaptive=True, **options)
    loss.update({"gap": 0.02, "alpha": 0.3}, Progress(0, 10))
    loss.update({"gap": -0.01}, Progress(1, 10))
    loss.update({}, Progress(2, 10))
    mean_gap = 0.9 * 0.02 - 0.1 * 0.01
    rows = targets, ANSWERS, COMPARED
    (term,) = losses.adapt_terms([Term("skew", loss)], hidden, head, teacher, *rows)
    sums = losses.fused_linear([term], hidden, head, teacher, targets, distilled=COMPARED, chunk_bytes=600)

    x, y = hidden @ head._weight.T, teacher.hidden @ teacher.head._weight.T
    p, q = y.softmax(-1), x.softmax(-1)
    expected, alphas, gaps = 0.0, [], []
    for number in range(3):
        chosen = (number == ANSWERS) & COMPARED
        right = targets[chosen].unsqueeze(1)
        ours, theirs = (m[chosen].gather(1, right).log().mean().exp().item() for m in (q, p))
        gap = theirs - ours if name == "skew_forward_kl" else ours - theirs
        alpha = min(0.3, max(0.01, 1 - 0.7 * mean_gap / (gap + 1e-5)))
        first, second = (p, q) if name == "skew_forward_kl" else (q, p)
        inner = q.detach() if options else q
        mixed = alpha * p + (1 - alpha) * q if name == "skew_forward_kl" else alpha * inner + (1 - alpha) * second
        expected = expected + (first * (first.log() - mixed.log()))[chosen].sum()
        alphas += [alpha] * int(chosen.sum())
        gaps += [gap] * int(chosen.sum())
    assert len(set(alphas)) > 1
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, hidden)[0] for value in (sums.loss, expected)))
    assert float(sums.terms["skew"].signals["alpha"]) == pytest.approx(sum(alphas))
    assert float(sums.terms["skew"].signals["gap"]) == pytest.approx(sum(gaps))


def test_adaptive_begins_as_the_plain_loss_and_keeps_its_mean(models):
    hidden, head, teacher, targets = models
    plain, loss = losses.build("skew_forward_kl"), losses.build("skew_forward_kl", adaptive=True)
    (term,) = losses.adapt_terms([Term("loss", loss)], hidden, head, teacher, targets, ANSWERS, COMPARED)
    first = losses.fused_linear([term], hidden, head, teacher).loss
    torch.testing.assert_close(first, losses.fused_linear(plain, hidden, head, teacher).loss)
    loss.update({"gap": 0.25}, Progress(0, 2))
    loss.update({"gap": math.nan}, Progress(1, 2))
    other = losses.build("skew_forward_kl", adaptive=True)
    other.load_state_dict(loss.state_dict())
    assert other.get_extra_state() == {"mean_gap": 0.25}


def test_adaptive_is_refused_where_there_are_no_answers():
    inner = {"name": "skew_forward_kl", "adaptive": True}
    with pytest.raises(LossError, match="term of its own"):
        losses.build("taid", divergence=inner)
    with pytest.raises(LossError, match="standardise"):
        losses.build("skew_forward_kl", adaptive=True, standardise=True)
