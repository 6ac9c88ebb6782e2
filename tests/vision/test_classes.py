"""Class sets in other orders, other namings and other sizes."""

import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from data.errors import UserError
from vision.classes import map_classes, plain, synset, words

SYNSETS = tuple(ImageNetInfo("imagenet-1k").label_names())


def mapped(student, teacher, data, **sizes):
    sizes = {"student_outputs": len(student or data), "teacher_outputs": teacher and len(teacher)} | sizes
    return map_classes(student, teacher, data, **sizes)


def test_equal_sets_need_no_index():
    found = mapped(("cat", "dog"), ("cat", "dog"), ("cat", "dog"))
    assert (found.labels, found.teacher_index, found.notes) == (None, None, ())


def test_another_order_and_spelling():
    student, teacher = ("Tabby Cat", "dog", "pick_up"), ("pick up", "tabby cat", "DOG")
    found = mapped(student, teacher, ("dog", "tabby_cat", "pick up"))
    assert found.labels.tolist() == [1, 0, 2]
    assert found.teacher_index.tolist() == [1, 2, 0]
    logits = torch.arange(6.0).reshape(2, 3)
    assert logits[:, found.teacher_index].tolist() == [[1, 2, 0], [4, 5, 3]]


def test_no_teacher():
    assert mapped(("a", "b"), None, ("b", "a")).labels.tolist() == [1, 0]


def test_a_teacher_of_more_classes_is_sliced():
    subset = SYNSETS[100:200][::-1]
    found = mapped(subset, SYNSETS, subset)
    assert found.labels is None
    assert found.teacher_index.tolist() == list(range(199, 99, -1))
    larger = tuple(ImageNetInfo("imagenet-22k-ms").label_names())  # most of the larger sets lack the teddy
    index = mapped(SYNSETS, larger, SYNSETS).teacher_index
    assert [larger[i] for i in index] == list(SYNSETS)


def test_three_namings_of_imagenet():
    info = ImageNetInfo("imagenet-1k")
    described = [info.label_name_to_description(s) for s in SYNSETS]
    for naming in (IMAGENET_CLASSNAMES, described):
        found = mapped(naming, SYNSETS, naming)
        assert (found.labels, found.teacher_index) == (None, None)
    # Apart from names that two classes share, every name finds its synset alone.
    assert sum(synset(n) != s for n, s in zip(IMAGENET_CLASSNAMES, SYNSETS, strict=True)) <= 3
    subset = ("goldfish", "Carassius auratus", "n01443537", "tench, Tinca tinca")
    assert [synset(n) for n in subset] == ["n01443537"] * 3 + ["n01440764"]
    assert mapped(SYNSETS, None, ("goldfish", "tench")).labels.tolist() == [1, 0]
    assert synset("crane") == synset("no such thing") or synset("crane") in SYNSETS
    assert synset("sunglasses") is None


def test_words_for_prompts():
    assert words()["n01443537"] == "goldfish"
    assert words()[SYNSETS[134]] == IMAGENET_CLASSNAMES[134]
    assert words().keys() >= set(SYNSETS)


def test_unknown_names_of_equal_number_are_taken_in_order_and_said_so():
    found = mapped(None, None, ("a", "b"), teacher_outputs=2)
    assert (found.labels, found.teacher_index) == (None, None)
    assert len(found.notes) == 2
    digits = tuple(str(i) for i in range(10))
    assert mapped(digits, None, [f"class {i}" for i in range(10)]).labels is None


def test_a_student_without_names_has_the_datas():
    found = mapped(None, ("b", "a"), ("a", "b"))
    assert found.teacher_index.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("student", "teacher", "data", "sizes", "message"),
    [
        (("a",), None, ("a", "zebra"), {}, "the student lacks 1 of the data's classes: zebra"),
        (("a", "b"), ("a", "c"), ("a",), {}, "the teacher lacks 1 of the student's classes: b"),
        (SYNSETS, SYNSETS[:10], SYNSETS, {}, "lacks 990 of .* and 985 more"),
        (None, None, ("a", "b"), {"student_outputs": 3}, "data has 2, the student 3"),
        (("a", "b"), None, ("a", "b"), {"teacher_outputs": 5}, "the student has 2, the teacher 5"),
        (("a", "b", "B "), None, ("b", "a"), {}, r"lacks 1 .*: b \(occurs 2 times\)"),
        (("a", "b", "c"), None, ("b", "B"), {}, "have 'b' more than once"),
    ],
)
def test_refusals(student, teacher, data, sizes, message):
    with pytest.raises(UserError, match=message):
        mapped(student, teacher, data, **sizes)


def test_plain():
    assert plain(" Egyptian_Cat  ") == "egyptian cat"
