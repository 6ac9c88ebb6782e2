"""Models with the same processor share each sample's encoding, and receive what they would receive alone."""

import copy

import families
import pytest
import torch
from batches import same

from data.attempts import checked
from data.collate import Collator, LoadedSample
from data.conversation import Document
from data.workers import make_loader
from vlm_distill.models.family_classes import adapted
from vlm_distill.models.shared_processing import share_processing


@pytest.fixture(scope="module")
def make(make_tokenizer):
    """The processor of a family, made anew at each call."""
    maker = families.Maker(make_tokenizer)

    def get(name, seed=0):
        return adapted(*maker.build(name, seed=seed)).processor

    return get


@pytest.fixture
def samples(talk, picture):
    wide, tall = picture(1, (60, 30)), picture(2, (30, 60))
    return [
        (talk([None, "What colour is it?"], "It is red."), [wide]),
        (talk(["Is", None, "red?"], "yes"), [tall]),
        (talk([None, "Yes?"], "no"), [wide]),
        (talk("Is it red?", "yes"), []),
        (talk([None, "What colour?", None], "It is red and blue."), [wide, tall]),
        (talk([None, None, "Yes?"], "no"), [wide, tall]),
    ]


def is_shared(batch):
    return all(tensor is batch.teacher.inputs[name] for name, tensor in batch.student.inputs.items())


def batch_of(collator, samples):
    """The batch of samples that are encoded one by one."""
    return collator.batch([pair for sample in samples for pair in collator.encode(*sample)])


def batch_of_all(collator, samples):
    """The batch of samples that are encoded together."""
    results = collator.encode_all([LoadedSample(*sample) for sample in samples])
    return collator.batch([pair for result in results for pair in checked(result)])


@pytest.mark.parametrize("packed", [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_shared_encoding_equals_two(name, packed, make, samples):
    student, teacher = make(name), make(name, seed=1)
    one, two = share_processing(student, teacher)
    assert one is two
    if name.startswith("paligemma"):
        samples = [sample for sample in samples if sample[1]]
    # All samples, and none, whose row has a blank image.
    for chosen in (samples, samples[:1], []):
        shared = batch_of_all(Collator(one, two, 4096, packed=packed), chosen)
        apart = batch_of(Collator(student, teacher, 4096, packed=packed), chosen)
        same(shared, apart)
        assert is_shared(shared) == (packed[0] == packed[1])
        assert not is_shared(apart)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_models_that_share_text_or_images_alone_get_what_they_would_get_apart(name, make, samples):
    student = make(name)
    if student.chat_template is None:
        samples = [sample for sample in samples if sample[1]]
    for change in (change_template, change_size):
        teacher = make(name)
        if change is change_size or teacher.chat_template is not None:
            change(teacher)
        one, two = share_processing(student, teacher)
        apart = batch_of(Collator(student, teacher, 4096), samples)
        for packed in ((False, False), (True, False)):
            expected = batch_of(Collator(student, teacher, 4096, packed=packed), samples)
            same(batch_of_all(Collator(one, two, 4096, packed=packed), samples), expected)
        # The second time, nothing is left of the first.
        same(batch_of(Collator(one, two, 4096), samples), apart)


@pytest.mark.parametrize("change", ["template", "images", "both"])
def test_unlike_processors_do_once_what_is_the_same(change, make, samples, monkeypatch):
    student, teacher = make("llava"), make("llava")
    if change != "images":
        change_template(teacher)
    if change != "template":
        change_size(teacher)
    images, texts = [], []
    resize = type(student.processor.image_processor).preprocess
    check = type(student)._check
    monkeypatch.setattr(
        type(student.processor.image_processor), "preprocess", lambda *a, **o: images.append(1) or resize(*a, **o)
    )
    monkeypatch.setattr(type(student), "_check", lambda *a: texts.append(1) or check(*a))
    # Two calls: for samples 0 and 2, and for sample 1.
    batch = batch_of_all(Collator(*share_processing(student, teacher), 4096), samples[:3])
    assert (len(images), len(texts)) == {"template": (2, 6), "images": (4, 3), "both": (4, 6)}[change]
    # Pixels that both models take are one tensor.
    assert (batch.student.inputs["pixel_values"] is batch.teacher.inputs["pixel_values"]) == (change == "template")


@pytest.mark.parametrize("name", ["llava", "pixtral", "paligemma"])
def test_a_bad_sample_leaves_the_others_of_its_call_alone(name, make, samples, monkeypatch):
    processor = make(name)
    collator = Collator(processor, processor, 4096)
    samples = [samples[0], samples[2], samples[0]]
    expected = batch_of(collator, [samples[0], samples[2]])
    image = samples[1][1][0].copy()
    calls = type(processor.processor).__call__

    def refuse(self, *args, images, **options):
        if any(one is image for own in images for one in own):
            raise ValueError("a broken image")
        return calls(self, *args, images=images, **options)

    monkeypatch.setattr(type(processor.processor), "__call__", refuse)
    talk, _ = samples[1]
    first, bad, last = collator.encode_all([LoadedSample(*s) for s in (samples[0], (talk, [image]), samples[2])])
    assert (bad.reason, bad.detail) == ("processor refuses the sample", "a broken image")
    same(collator.batch([*first, *last]), expected)


def test_small_samples_share_a_call(make, samples, monkeypatch):
    processor = make("llava")
    counts = []
    calls = type(processor.processor).__call__

    def count(self, *args, text, **options):
        counts.append(len(text))
        return calls(self, *args, text=text, **options)

    monkeypatch.setattr(type(processor.processor), "__call__", count)
    batch_of_all(Collator(processor, None, 4096), samples)
    assert sorted(counts) == [1, 1, 2, 2]


def change_template(processor):
    processor.set_chat_template(processor.chat_template + " ")


def change_size(processor):
    processor.processor.image_processor = copy.deepcopy(processor.processor.image_processor)
    processor.processor.image_processor.image_mean = [0.1, 0.2, 0.3]


def change_token(processor):
    processor.tokenizer.add_tokens(["magenta"])


def change_prefix(processor):
    processor.learn_answer_prefix = True


def change_rows(processor):
    processor.one_row = True


def change_replacement(processor):
    processor.processor.patch_size = 14


CHANGES = [change_template, change_size, change_token, change_prefix, change_rows, change_replacement]


@pytest.mark.parametrize("change", CHANGES)
def test_processors_that_differ_are_not_shared(change, make):
    student, teacher = make("llava"), make("llava")
    assert student.recipe() == teacher.recipe()
    change(teacher)
    one, two = share_processing(student, teacher)
    assert one is not two


def test_features_in_place_of_pixels_are_shared_only_with_the_same_ones(make):
    student, teacher = make("llava"), make("llava")

    def features(images):
        raise AssertionError

    own = student.with_features(features)
    assert share_processing(own, teacher)[1].features is None
    assert share_processing(own, teacher.with_features(features))[1] is own


class Items(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __getitem__(self, index):
        return self.batch


@pytest.mark.parametrize("workers", [0, 1])
def test_shared_pixels_are_sent_and_moved_once(workers, make, samples):
    processor = make("llava")
    batch = batch_of(Collator(processor, processor, 4096), samples)
    (arrived,) = make_loader(Items(batch), 0, 1, workers=workers)
    same(arrived, batch)
    assert is_shared(arrived)
    moved = arrived.to("meta")
    assert moved.student.inputs["pixel_values"].is_meta
    assert is_shared(moved)
    # A model's side can still be given other inputs without the other's noticing.
    del moved.student.inputs["pixel_values"]
    assert "pixel_values" in moved.teacher.inputs


def test_documents_are_shared(make):
    processor = make("llava")
    batch = batch_of(Collator(processor, processor, 8), [(Document("What colour is the circle? It is red."),)])
    apart = batch_of(Collator(processor, make("llava"), 8), [(Document("What colour is the circle? It is red."),)])
    same(batch, apart)
    assert is_shared(batch)
