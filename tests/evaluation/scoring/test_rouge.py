"""ROUGE-L against values that Google's rouge-score 0.1.2 computed; subsequences against the table's recursion."""

import random

import pytest

from vlm_distill.evaluation.scoring.rouge import longest_common_subsequence, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat lay on a mat", "the cat sat on the mat", 0.6666666667),
        ("the gunman killed police", "police killed the gunman", 0.5),
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("its 3.5 km it is", "It's 3.5 km, isn't it?", 0.5714285714),
        ("g f e d c b a", "a b c d e f g", 0.1428571429),
        ("one", "one", 1.0),
        ("no", "yes", 0.0),
        ("a b a a", "a a b a", 0.75),
        ("A quick fox -- jumped over the dog, the end", "The quick brown fox jumps over the lazy dog. The end!", 0.7),
        ("", "x", 0.0),
        ("under score TEST", "under_score test", 1.0),
    ],
)
def test_the_reference_agrees(answer, reference, score):
    assert rouge_l(answer, [reference]) == pytest.approx(score, abs=1e-9)


def test_the_best_reference_counts():
    assert rouge_l("a b", ["c", "a b", "a"]) == 1.0
    assert rouge_l("a b", []) == 0.0


def test_words_of_any_alphabet():
    assert rouge_l("Größe und Maß", ["größe oder maß"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_common_subsequence(seed):
    rng = random.Random(seed)
    a, b = (rng.choices("abcd", k=rng.randrange(90)) for _ in range(2))
    row = [0] * (len(b) + 1)
    for x in a:
        row, last = [0] * (len(b) + 1), row
        for j, y in enumerate(b):
            row[j + 1] = last[j] + 1 if x == y else max(last[j + 1], row[j])
    assert longest_common_subsequence(a, b) == row[-1]
