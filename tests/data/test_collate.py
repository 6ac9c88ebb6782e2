"""Alignment of student and teacher token by token, and micro-batches with their positions and dummy rows."""

import pytest
import torch
from PIL import Image

from data.collate import collate
from data.encoding import encode_pair
from data.errors import BadSample
from data.layouts import to_conversation

END, OTHER_END, NEWLINE = 4, 5, 10


def conversation(*texts, images=()):
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return to_conversation({"messages": messages, "images": list(images)})


def pair_of(student, teacher, *texts, max_length=100):
    return encode_pair(conversation(*texts), [], student, teacher, max_length)


def aligned(pair):
    """(student's id, teacher's id or None, distilled) of each supervised token, letters as letters."""

    def name(token):
        return chr(token) if token > 20 else int(token)

    student = pair.student.input_ids[pair.student_tokens].tolist()
    teacher = pair.teacher.input_ids[pair.teacher_tokens].tolist()
    return [
        (name(s), name(t) if d else None, d) for s, t, d in zip(student, teacher, pair.distilled.tolist(), strict=True)
    ]


def test_without_a_teacher(processor):
    pair = pair_of(processor(), None, "q", "ab", "q", "c")
    assert pair.student.input_ids[pair.student_tokens].tolist() == [*map(ord, "ab"), END, ord("c"), END]
    assert pair.teacher is None
    assert pair.distilled.all()


def test_different_templates_and_the_same_answers(processor):
    pair = pair_of(processor(), processor(system=7), "q", "ab", "qq", "c")
    assert aligned(pair) == [("a", "a", True), ("b", "b", True), (4, 4, True), ("c", "c", True), (4, 4, True)]
    assert pair.teacher_tokens.tolist() == [i + 7 for i in pair.student_tokens.tolist()]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([END], [OTHER_END], [(4, None, False)]),
        ([END, NEWLINE], [END], [(4, 4, True), (10, None, False)]),
        ([END, NEWLINE], [OTHER_END, NEWLINE], [(4, None, False), (10, 10, True)]),
        ([END, END], [END], [(4, 4, True), (4, None, False)]),
        ([END], [END, NEWLINE], [(4, 4, True)]),
        ([END], [], [(4, None, False)]),
        ([], [END], []),
        ([], [], []),
    ],
)
def test_end_tokens(processor, student, teacher, expected):
    pair = pair_of(processor(ends=student), processor(ends=teacher), "q", "a", "q", "a")
    assert aligned(pair) == [("a", "a", True), *expected] * 2


def test_answers_that_follow_each_other_without_a_token_between(processor):
    class Adjacent(processor):
        def encode(self, conversation, images):
            row = super().encode(conversation, images)
            keep = row.supervised | (torch.arange(len(row.supervised)) == 0)
            row.input_ids, row.supervised, row.ends = row.input_ids[keep], row.supervised[keep], row.ends[keep]
            return row

    pair = pair_of(Adjacent(), processor(ends=[OTHER_END]), "q", "a", "q", "b")
    assert aligned(pair) == [("a", "a", True), (4, None, False), ("b", "b", True), (4, None, False)]


def test_misaligned_answers_are_refused(processor):
    def shout(character):
        return ord(character.upper())

    with pytest.raises(BadSample, match="misaligned: answer 2: token 2 is 99 for the student, 67 for the teacher"):
        pair_of(processor(), processor(spell=shout), "q", "1", "q", "2c")

    class Longer(processor):
        def encode(self, conversation, images):
            row = super().encode(conversation, images)
            for name, value in (("input_ids", 98), ("supervised", True), ("ends", False), ("spans", [1, 0, 1])):
                tensor = getattr(row, name)
                setattr(row, name, torch.cat([tensor[:-1], torch.tensor([value]), tensor[-1:]]))
            return row

    with pytest.raises(BadSample, match="answer 1: 1 tokens for the student, 2 for the teacher"):
        pair_of(processor(), Longer(), "q", "a")

    class LastOnly(processor):
        def encode(self, conversation, images):
            row = super().encode(conversation, images)
            row.supervised[: len(row.supervised) - 2] = False
            row.spans = row.spans[2:]
            return row

    with pytest.raises(BadSample, match="misaligned: answer 1: no token for the teacher"):
        pair_of(processor(), LastOnly(), "q", "a", "q", "b")


def test_too_long_is_never_cut(processor):
    # Six tokens: mark, q, mark, a, b, end.
    assert len(pair_of(processor(), None, "q", "ab", max_length=6).student.input_ids) == 6
    with pytest.raises(BadSample, match="too long: 6 tokens for the student, limit 5"):
        pair_of(processor(), None, "q", "ab", max_length=5)
    with pytest.raises(BadSample, match="too long: 9 tokens for the teacher, limit 8"):
        pair_of(processor(), processor(system=3), "q", "ab", max_length=8)


def test_nothing_to_learn_or_nothing_to_learn_from(processor):
    class Unmarked(processor):
        def encode(self, conversation, images):
            row = super().encode(conversation, images)
            row.supervised[:] = False
            return row

    class Headless(processor):
        def encode(self, conversation, images):
            row = super().encode(conversation, images)
            row.input_ids, row.supervised, row.ends = row.input_ids[3:], row.supervised[3:], row.ends[3:]
            return row

    with pytest.raises(BadSample, match="no supervised token"):
        pair_of(Unmarked(), None, "q", "a")
    with pytest.raises(BadSample, match="no supervised token: the teacher"):
        pair_of(processor(), Unmarked(), "q", "a")
    with pytest.raises(BadSample, match="first token is supervised"):
        pair_of(Headless(), None, "q", "a")


def batch_of(student, teacher, *samples):
    pairs = [
        encode_pair(conversation(*texts, images=images), images, student, teacher, 100) for texts, images in samples
    ]
    return collate(pairs, student, teacher)


IMAGE = Image.new("RGB", (1, 1), (1, 2, 3))


def test_positions_are_of_the_tokens_before(processor):
    student, teacher = processor(), processor(image_tokens=5, system=2)
    batch = batch_of(student, teacher, (("q", "ab"), [IMAGE]), (("long question", "c"), []))
    assert batch.targets.tolist() == [*map(ord, "ab"), END, ord("c"), END]
    for rows in (batch.student, batch.teacher):
        ids = rows.inputs["input_ids"].flatten()
        assert ids[rows.positions + 1].tolist() == batch.targets.tolist()
        assert ids[rows.positions[0]] == 2  # the mark of the assistant's message
    assert batch.samples == 2
    assert batch.distilled.tolist() == [True] * 5
    assert batch.student.inputs["pixel_values"].tolist() == [[6.0]]


@pytest.mark.parametrize(("student_sees", "teacher_sees"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_dummy_row_for_both_where_a_vision_model_has_no_image(processor, student_sees, teacher_sees):
    student, teacher = processor(has_vision=student_sees), processor(has_vision=teacher_sees)
    batch = batch_of(student, teacher, (("q", "a"), []), (("q", "b"), []))
    rows = 3 if student_sees or teacher_sees else 2
    assert len(batch.student.inputs["input_ids"]) == len(batch.teacher.inputs["input_ids"]) == rows
    assert ("pixel_values" in batch.student.inputs) == student_sees
    assert ("pixel_values" in batch.teacher.inputs) == teacher_sees
    assert batch.samples == 2
    assert batch.targets.tolist() == [ord("a"), END, ord("b"), END]
    assert int(batch.student.positions.max()) < 2 * batch.student.inputs["input_ids"].shape[1]


@pytest.mark.parametrize("sees", [True, False])
def test_an_empty_micro_batch_is_the_dummy_row_alone(processor, sees):
    batch = collate([], processor(has_vision=sees), processor(has_vision=sees))
    assert len(batch.student.inputs["input_ids"]) == len(batch.teacher.inputs["input_ids"]) == 1
    assert (len(batch.targets), len(batch.distilled), batch.samples) == (0, 0, 0)
    assert batch.student.positions.dtype == batch.targets.dtype == torch.int64
    assert batch.distilled.dtype == torch.bool


# Samples in one row.


def seen(rows):
    """The pixels of the samples' images, in the samples' order."""
    return rows.inputs["pixel_values"][rows.images].flatten().tolist()


@pytest.mark.parametrize("packed", [(True, True), (True, False), (False, True), (False, False)])
def test_whatever_rows_they_stand_in_the_samples_keep_their_order(processor, packed):
    # The teacher's images are so long that its rows hold other samples than the student's.
    student, teacher = processor(), processor(image_tokens=9, system=1)
    samples = [(("q", "ab"), [1, 2]), (("a long question", "c"), [3]), (("q", "defg"), []), (("q", "h"), [4])]
    pairs = []
    for texts, colours in samples:
        images = [Image.new("RGB", (1, 1), (colour, 0, 0)) for colour in colours]
        pairs.append(encode_pair(conversation(*texts, images=images), images, student, teacher, 30))
    batch = collate(pairs, student, teacher, packed=packed)
    assert "".join(chr(t) for t in batch.targets.tolist() if t > 20) == "abcdefgh"
    assert batch.sample_of.tolist() == [0] * 3 + [1] * 2 + [2] * 5 + [3] * 2
    assert (batch.samples, batch.images) == (4, 4)
    both = [pair.student for pair in pairs], [pair.teacher for pair in pairs]
    for rows, sides, packs in zip((batch.student, batch.teacher), both, packed, strict=True):
        ids = rows.inputs["input_ids"]
        assert ids.flatten()[rows.positions + 1].equal(batch.targets)
        assert seen(rows) == [1, 2, 3, 4]
        # The colour of each image token's image, counted through the rows.
        a = len(rows.image_tokens) // 4
        colours = rows.inputs["pixel_values"].flatten().repeat_interleave(a)
        assert colours[rows.image_tokens].tolist() == [1] * a + [2] * a + [3] * a + [4] * a
        # The k-th image token in the order of the rows is at the k-th position that holds one.
        places = (ids.flatten() == ids.flatten()[rows.image_positions[0]]).nonzero().flatten()
        assert rows.image_positions.equal(places[rows.image_tokens])
        assert rows.image_counts.tolist() == [2 * a, a, 0, a]
        assert ids.shape[1] == max(len(side.input_ids) for side in sides)
        assert (len(ids) < 4) == packs
        assert rows.tokens == int((ids != 0).sum())
    if packed[0]:
        # The longest is first, and its image with it.
        assert batch.student.inputs["pixel_values"].flatten().tolist() == [3, 1, 2, 4]
        student.one_row = True
        batch = collate(pairs, student, teacher, packed=packed)
        assert batch.student.inputs["input_ids"].shape == (1, batch.student.tokens)
        assert batch.student.inputs["input_ids"][0][batch.student.positions + 1].equal(batch.targets)


def test_a_dummy_shares_a_row_with_the_samples(processor):
    student, teacher = processor(), processor(system=2)
    pairs = [pair_of(student, teacher, "q", "a"), pair_of(student, teacher, "q", "b")]
    batch = collate(pairs, student, teacher, packed=(True, True))
    for rows in (batch.student, batch.teacher):
        ids = rows.inputs["input_ids"]
        assert len(rows.inputs["pixel_values"]) == 1
        assert len(rows.images) == len(rows.image_tokens) == 0
        assert ids.flatten()[rows.positions + 1].equal(batch.targets)
    empty = collate([], student, teacher, packed=(True, True))
    assert empty.student.inputs["input_ids"].tolist() == [[3, 3]]
    assert (len(empty.targets), len(empty.student.positions), empty.samples) == (0, 0, 0)
