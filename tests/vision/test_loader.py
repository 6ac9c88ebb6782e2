"""Steps of images: the same views for any split over ranks and workers; fixed views repeat, others never."""

import dataclasses
import io
import pickle
import random
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import BadSample, UserError
from data.images import load_image
from data.loader import StepSplit
from data.mixture import Mixture
from data.workers import make_loader
from vision.augmentation import Augmentation, Erasing, Mixing
from vision.device_views import DeviceViews
from vision.inputs import InputSettings
from vision.loader import ImageSteps, ViewSettings
from vlm_distill.caching.class_logits import LogitCache

INPUTS = InputSettings((16, 16), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bilinear", 1.0)
WEAK = Augmentation(crop="pad", padding=2, color_jitter=0)
STRONG = Augmentation(auto_augment="rand-m9-mstd0.5-inc1")


@dataclasses.dataclass(frozen=True)
class Labelled:
    image: object
    label: int


class Images:
    """Noise, held in memory; row ``i`` has label ``i % 5``, and an exception in place of an image is raised."""

    def __init__(self, n, name="train", seed=0, size=16):
        rng = np.random.RandomState(seed)
        self.name, self.classes = name, tuple("abcde")
        self.images = [Image.fromarray(rng.randint(0, 256, (size, size, 3), np.uint8)) for _ in range(n)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        if isinstance(self.images[row], Exception):
            raise self.images[row]
        return Labelled(self.images[row], row % 5)

    def line(self, row):
        return row + 1

    def size(self, row):
        return 1


def make(
    sources=None,
    augmentations=(WEAK,),
    batch_size=8,
    world=1,
    rank=0,
    micro=2,
    weights=None,
    seed=5,
    fixed_views=0,
    repeats=1,
    **options,
):
    mixture = Mixture([Images(21)] if sources is None else sources, weights, seed=seed, batch_size=batch_size)
    return ImageSteps(
        mixture,
        INPUTS,
        ViewSettings(augmentations, fixed_views, repeats, checks=True),
        split=StepSplit(micro, batch_size // (micro * world), rank, world),
        **options,
    )


def content(batch):
    return [x.tolist() for x in (batch.images, batch.labels, batch.rows, batch.checks)], batch.number


def contents(loader):
    return [(step.index, step.problems, [content(b) for b in step.batches]) for step in loader]


def views_of(steps, indices):
    """All views by row: the bytes of each, in the order of steps."""
    found = {}
    for index in indices:
        for batch in steps[index].batches:
            count = len(batch.images) // max(1, batch.samples)
            for i, row in enumerate(batch.rows.tolist()):
                for view in range(count):
                    found.setdefault((row, view), []).append(batch.images[view * batch.samples + i].numpy().tobytes())
    return found


@pytest.mark.parametrize("options", [{}, {"fixed_views": 2}, {"repeats": 2}])
def test_one_rank_by_four_is_two_by_two_is_four_by_one(options):
    options |= {"augmentations": (WEAK, STRONG)}
    for index in range(5):
        whole = [content(b) for b in make(**options)[index].batches]
        assert [number for _, number in whole] == [0, 1, 2, 3]
        two = [make(world=2, rank=rank, **options)[index].batches for rank in range(2)]
        assert [content(two[g % 2][g // 2]) for g in range(4)] == whole
        four = [make(world=4, rank=rank, **options)[index].batches for rank in range(4)]
        assert [content(four[g][0]) for g in range(4)] == whole


def test_what_the_device_makes_of_them_is_the_same_for_any_ranks():
    device = DeviceViews(INPUTS, None, 5, erasing=Erasing(probability=0.5), mixing=Mixing(mixup=0.8, cutmix=1.0))

    def seen(batches):
        return [[x.tolist() for x in (v.student, v.soft)] for v in (device(b, seed=5, step=3) for b in batches)]

    whole = seen(make()[3].batches)
    two = [seen(make(world=2, rank=rank)[3].batches) for rank in range(2)]
    assert [two[g % 2][g // 2] for g in range(4)] == whole
    assert whole[0] != whole[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_steps(workers):
    expected = contents(make_loader(make(), 0, 5))
    assert contents(make_loader(make(), 0, 5, workers=workers, prefetch=1)) == expected
    assert contents(make_loader(pickle.loads(pickle.dumps(make())), 3, 5)) == expected[3:]


def test_batches_as_described():
    steps = make(augmentations=(WEAK, STRONG), sources=[Images(4, "a"), Images(6, "b", 1)], batch_size=6, micro=3)
    assert steps.steps_per_epoch == 2
    rows = []
    for index in range(2):
        for batch in steps[index].batches:
            n = batch.samples
            assert (batch.images.shape, batch.images.dtype) == ((2 * n, 3, 16, 16), torch.uint8)
            assert batch.labels.tolist() == [row % 5 if row < 4 else (row - 4) % 5 for row in batch.rows.tolist()]
            pixels = batch.images.permute(0, 2, 3, 1).contiguous().numpy()
            assert batch.checks.tolist() == [zlib.crc32(view.data) for view in pixels]
            rows += batch.rows.tolist()
            moved = batch.to("cpu")
            assert content(moved) == content(batch)
    assert sorted(rows) == list(range(10))
    mixture = Mixture([Images(8)], batch_size=8)
    assert len(ImageSteps(mixture, INPUTS, split=StepSplit(8))[0].batches[0].checks) == 0


def test_without_augmentation_a_view_is_the_image():
    source = Images(8)
    batch = make([source], (None,), micro=8)[0].batches[0]
    for image, row in zip(batch.images, batch.rows.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), source.images[row])


def test_epochs_and_seeds_differ():
    once = views_of(make(), range(3))
    assert all(len(views) == 1 for views in once.values())
    both = views_of(make(), range(6))
    assert sum(len(set(views)) == 2 for views in both.values()) > 15
    assert views_of(make(seed=6), range(3)) != once


def test_a_row_that_an_epoch_takes_twice_is_seen_in_two_views():
    views = views_of(make(weights=[2.0]), range(6))
    assert all(len(one) == 2 for one in views.values())
    assert sum(len(set(one)) == 2 for one in views.values()) > 15


def test_fixed_views_come_again():
    steps = make(fixed_views=2)
    assert [steps.turn(step) for step in (0, 2, 3, 6)] == [0, 0, 1, 0]
    epochs = [views_of(steps, range(3 * e, 3 * e + 3)) for e in range(4)]
    assert epochs[0] == epochs[2]
    assert epochs[1] == epochs[3]
    assert sum(epochs[0][key] != epochs[1][key] for key in epochs[0]) > 15
    checks = {}
    for index in range(6):
        for batch in steps[index].batches + steps[index + 6].batches:
            for row, check in zip(batch.rows.tolist(), batch.checks.tolist(), strict=True):
                checks.setdefault((row, index // 3), set()).add(check)
    assert len(checks) == 42
    assert all(len(one) == 1 for one in checks.values())


def test_a_teachers_answers_to_fixed_views_are_kept(tmp_path):
    def cache():
        return LogitCache(tmp_path / "cache", {"train": 21}, views=4, categories=5, identity={"seed": "5"})

    def parts(steps, step):
        """The views of a step: rows, number of the view, checks, pixels."""
        for batch in steps[step].batches:
            for view, (checks, images) in enumerate(zip(batch.checks.chunk(2), batch.images.chunk(2), strict=True)):
                yield batch.rows, 2 * steps.turn(step) + view, checks, images

    steps = make(fixed_views=2, augmentations=(WEAK, STRONG))
    for step in range(6):
        for rows, view, checks, images in parts(steps, step):
            assert cache().read(rows, view, checks) is None or not len(rows)
            cache().write(rows, view, checks, images.float().mean((2, 3))[:, [0, 1, 2, 0, 1]])
    # The next epochs are in another order and on two ranks.
    for rank in range(2):
        steps = make(fixed_views=2, augmentations=(WEAK, STRONG), world=2, rank=rank)
        for step in range(6, 12):
            for rows, view, checks, images in parts(steps, step):
                assert torch.equal(cache().read(rows, view, checks), images.float().mean((2, 3))[:, [0, 1, 2, 0, 1]])
    other = make(fixed_views=2, augmentations=(WEAK, Augmentation(color_jitter=0)))
    rows, view, checks, _ = list(parts(other, 6))[1]
    with pytest.raises(UserError, match=r"^train, sample \d+, view 1: not the pixels"):
        cache().read(rows, view, checks)


def test_weak_and_strong_views_differ_and_neither_depends_on_the_other():
    both = views_of(make(augmentations=(WEAK, STRONG)), range(3))
    assert sum(both[row, 0] != both[row, 1] for row in range(21)) > 15
    weak = views_of(make(augmentations=(WEAK,)), range(3))
    assert all(both[key] == weak[key] for key in weak)
    # The same recipe twice still draws twice.
    twice = views_of(make(augmentations=(WEAK, WEAK)), range(3))
    assert sum(twice[row, 0] != twice[row, 1] for row in range(21)) > 12


def test_repeats_stand_in_the_same_step_in_different_views():
    steps = make(repeats=2, augmentations=(STRONG,))
    assert steps.steps_per_epoch == 3
    seen = []
    for index in range(3):
        batches = steps[index].batches
        rows = [row for batch in batches for row in batch.rows.tolist()]
        images = [image.numpy().tobytes() for batch in batches for image in batch.images]
        half = -(-len(rows) // 2)
        assert rows[half:] == rows[: len(rows) - half]
        assert len(set(rows)) == half
        assert sum(images[half + i] != images[i] for i in range(len(rows) - half)) >= len(rows) - half - 1
        # No micro-batch holds an image twice.
        assert index == 2 or all(len(set(batch.rows.tolist())) == batch.samples for batch in batches)
        seen += rows[:half]
    assert len(seen) == len(set(seen)) == 11
    later = {row for index in range(3, 6) for batch in steps[index].batches for row in batch.rows.tolist()}
    assert later - set(seen)


def test_no_random_number_is_taken():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    make(augmentations=(WEAK, STRONG))[0]
    assert state() == before
    random.random(), np.random.rand(), torch.rand(1)
    again = content(make()[0].batches[0])
    random.random(), np.random.rand(), torch.rand(1)
    assert content(make()[0].batches[0]) == again


# Bad samples.


def flawed():
    source = Images(10)
    source.images[2] = BadSample("record is broken", "no label")
    source.images[4] = b"no image"
    source.images[6] = "missing.png"
    source.images[8] = Image.new("RGB", (100, 100))
    return source


def test_bad_samples_leave_the_batch_smaller():
    steps = make([flawed()], batch_size=10, micro=5, load=partial(load_image, max_pixels=1000))
    step = steps[0]
    assert sorted((p.source, p.line, p.reason) for p in step.problems) == [
        ("train", 3, "record is broken"),
        ("train", 5, "not an image"),
        ("train", 7, "image not found"),
        ("train", 9, "image is too large"),
    ]
    assert sorted(row for batch in step.batches for row in batch.rows.tolist()) == [0, 1, 3, 5, 7, 9]
    # What is left is what it would have been.
    whole = views_of(make([Images(10)], batch_size=10, micro=5), [0])
    left = views_of(steps, [0])
    assert left == {key: whole[key] for key in left}


def test_fail_ends_with_the_place():
    with pytest.raises(UserError, match=r"^train, line \d: .*set data.bad_samples to skip") as caught:
        make([flawed()], batch_size=10, micro=5, on_bad="fail")[0]
    assert "\n" not in str(caught.value)


def test_labels_are_mapped_and_classes_the_student_lacks_are_bad_samples():
    steps = make([Images(10), Images(10, "other")], (None,), 20, micro=20, label_maps=[None, [3, 2, -1, 1, 0]])
    batch = steps[0].batches[0]
    labels = dict(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    assert [labels[row] for row in range(10)] == [0, 1, 2, 3, 4] * 2
    assert {row: labels[row] for row in range(10, 20) if row in labels} == {
        10: 3, 11: 2, 13: 1, 14: 0, 15: 3, 16: 2, 18: 1, 19: 0
    }  # fmt: skip
    assert [(p.source, p.reason, p.detail) for p in steps[0].problems] == [
        ("other", "class the student does not have", "c")
    ] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_without_a_good_image_is_empty(workers):
    source = Images(6)
    source.images = [BadSample("gone")] * 6
    (step,) = make_loader(make([source], (WEAK, STRONG), 6, micro=3), 0, 1, workers)
    for batch in step.batches:
        assert batch.images.shape == (0, 3, 16, 16)
        assert (batch.samples, batch.labels.dtype, batch.checks.dtype) == (0, torch.int64, torch.int64)
        views = DeviceViews(INPUTS, None, 5, mixing=Mixing(mixup=1.0))(batch, seed=0, step=0)
        assert len(views.student) == 0
    # So is one beyond the end of the smaller last step.
    last = make()[2].batches
    assert [batch.samples for batch in last] == [2, 2, 1, 0]


def test_files_and_bytes_are_read_within_the_roots(tmp_path):
    source = Images(4)
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    source.images[0].save(outside)
    source.images[1].save(inside / "one.png")
    memory = io.BytesIO()
    source.images[2].save(memory, "PNG")
    expected = list(source.images)
    source.images = [str(outside), str(inside / "one.png"), memory.getvalue(), source.images[3]]
    step = make([source], (None,), 4, micro=4, load=partial(load_image, roots=[inside]))[0]
    assert [p.reason for p in step.problems] == ["image outside the roots"]
    batch = step.batches[0]
    for image, row in zip(batch.images, batch.rows.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), expected[row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro": 3}, "batch size 8 is not 3 "),
        ({"repeats": 3}, "batch size 8 is not a multiple of 3 repeats"),
        ({"repeats": 2, "fixed_views": 1}, "1 fixed views and 2 repeats"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_messages_name_the_images_of_a_micro_batch():
    steps = make(world=2, rank=1)
    for number, batch in enumerate(steps[1].batches):
        lines = ", ".join(str(row + 1) for row in batch.rows.tolist())
        assert steps.locate_samples(1, number) == f"{steps.mixture.sources[0].name}, lines {lines}"
