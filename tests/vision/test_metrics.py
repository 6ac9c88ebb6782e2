"""Scores against their definitions, written out plainly."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from vision.metrics import calibration, expected_calibration_error, measure, summarise, together


def one_hot(labels, classes):
    return torch.nn.functional.one_hot(torch.tensor(labels), classes).bool()


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(200, 12, generator=generator)
    labels = torch.randint(0, 12, (200,), generator=generator).tolist()
    teacher = logits + torch.randn(200, 12, generator=generator)
    return logits, labels, teacher


def scores(logits, labels, teacher=None, names=None):
    pair = None if teacher is None else (logits, teacher)
    right = one_hot(labels, logits.shape[1])
    answers = measure(range(len(labels)), labels, logits, right, pair)
    return summarise(answers, names or [str(k) for k in range(logits.shape[1])])


def test_scores_are_their_definitions(drawn):
    logits, labels, teacher = drawn
    found = scores(*drawn)
    top1 = top5 = agree = 0
    nll, kl, by_class = [], [], {}
    for x, y, t in zip(logits.double().tolist(), labels, teacher.double().tolist(), strict=True):
        order = sorted(range(12), key=lambda k: -x[k])
        top1 += order[0] == y
        top5 += y in order[:5]
        p = [math.exp(v) / math.fsum(map(math.exp, x)) for v in x]
        q = [math.exp(v) / math.fsum(map(math.exp, t)) for v in t]
        nll.append(-math.log(p[y]))
        kl.append(sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)))
        agree += order[0] == max(range(12), key=lambda k: t[k])
        by_class.setdefault(str(y), []).append(order[0] == y)
    assert found["exact"] == top1 / 200
    assert found["top5"] == top5 / 200
    assert found["agreement"] == agree / 200
    assert found["nll"] == pytest.approx(sum(nll) / 200)
    assert found["kl"] == pytest.approx(sum(kl) / 200)
    by_class = dict(sorted(by_class.items(), key=lambda item: int(item[0])))
    assert found["by_type"] == {name: {"n": len(v), "exact": sum(v) / len(v)} for name, v in by_class.items()}
    assert found["interval"][0] < found["exact"] < found["interval"][1]


def test_ece_by_hand():
    # Bins of 1/15: 0.30 and 0.32 in (4/15, 5/15], 0.6 (its upper end) in (8/15, 9/15], 1.0 in the last.
    confidence = np.array([0.30, 0.32, 0.6, 1.0, 1.0])
    right = np.array([True, False, True, True, False])
    bins = calibration(confidence, right)
    assert [(b["n"], b["exact"]) for b in bins] == [(2, 0.5), (1, 1.0), (2, 0.5)]
    by_hand = (2 * abs(0.5 - 0.31) + 1 * abs(1 - 0.6) + 2 * abs(0.5 - 1)) / 5
    assert expected_calibration_error(bins) == pytest.approx(by_hand, abs=1e-15)


def test_a_calibrated_classifier_has_no_error():
    confidence = np.full(10, 0.7)
    assert expected_calibration_error(calibration(confidence, np.arange(10) < 7)) == pytest.approx(0, abs=1e-15)


def test_neither_batches_nor_their_order_matter(drawn):
    logits, labels, teacher = drawn
    whole = scores(*drawn)
    right = one_hot(labels, 12)
    for cuts in ([0, 200], [0, 3, 77, 120, 200]):
        parts = [
            measure(range(a, b), labels[a:b], logits[a:b], right[a:b], (logits[a:b], teacher[a:b]))
            for a, b in pairwise(cuts)
        ]
        assert summarise(together(parts[::-1]), [str(k) for k in range(12)]) == whole


def test_ties_go_as_topk_has_them():
    logits = torch.tensor([[1.0, 1, 0], [0, 2, 2]])
    first = logits.topk(1).indices[:, 0].tolist()
    assert scores(logits, first)["exact"] == 1


def test_fewer_than_five_classes_make_every_top5_right():
    assert scores(torch.randn(4, 3), [0, 1, 2, 0])["top5"] == 1


def test_several_right_labels_share_their_probability():
    logits = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    right = torch.tensor([[True, True, False], [True, False, True]])
    found = summarise(measure([0, 1], [0, 0], logits, right), "abc")
    p = logits.double().softmax(-1)
    assert found["exact"] == 0.5
    assert found["nll"] == pytest.approx(float(-((p[0, 0] + p[0, 1]).log() + (p[1, 0] + p[1, 2]).log()) / 2))


def test_a_class_that_the_teacher_excludes_costs_nothing():
    logits, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0, -math.inf]])
    assert scores(logits, [0], teacher)["kl"] == pytest.approx(math.log(3 / 2))


def test_logits_that_are_no_numbers_give_no_likelihood():
    found = scores(torch.full((2, 3), math.nan), [1, 2])
    assert found["nll"] is None
    assert found["ece"] is None


def test_of_nothing_there_is_no_score():
    found = summarise(together([]), "abc")
    assert (found["n"], found["exact"], found["by_type"]) == (0, None, {})
