"""Views: timm's and torchvision's own recipes, and what the device makes of them is seen alike by both models."""

import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from vision.augmentation import Augmentation, Erasing, Mixing
from vision.device_views import DeviceViews
from vision.inputs import InputSettings
from vision.loader import ImageBatch
from vision.transforms import build_transform, kept_randomness, seed_randomness

INPUTS = InputSettings((32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic", 0.875)
TEACHER = InputSettings((32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.875)


def noise(height=48, width=40, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


def seeded(transform, image, *key):
    with kept_randomness():
        seed_randomness(*key)
        return transform(image)


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# What workers do.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"color_jitter": (0.3, 0.2, 0.1), "scale": (0.5, 1.0), "ratio": (1.0, 1.0), "vflip": 0.5},
        {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"},
        {"auto_augment": "augmix-m5-w4-d2"},
        {"auto_augment": "3a"},
    ],
)
def test_a_training_view_is_timms(settings):
    # The defaults of timm's training script.
    theirs = timm.data.create_transform(
        (3, 32, 32),
        is_training=True,
        use_prefetcher=True,
        mean=INPUTS.mean,
        std=INPUTS.std,
        **{"interpolation": "random"} | settings,
    )
    ours = build_transform(INPUTS, Augmentation(**settings))
    for key in range(8):
        view = seeded(ours, noise(), key)
        assert (view.shape, view.dtype) == ((3, 32, 32), torch.uint8)
        assert torch.equal(view, seeded(theirs, noise(), key))


def test_an_evaluation_view_is_timms_and_draws_nothing():
    theirs = timm.data.create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.875, use_prefetcher=True)
    before = random_states()
    view = build_transform(INPUTS)(noise())
    assert torch.equal(view, theirs(noise()))
    fixed = Augmentation(crop="center", hflip=0, color_jitter=0)
    assert torch.equal(view, build_transform(INPUTS, fixed)(noise()))
    assert random_states() == before


def test_the_padded_crop_is_torchvisions():
    theirs = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    ours = build_transform(INPUTS, Augmentation(crop="pad", color_jitter=0))
    views = [seeded(ours, noise(32, 32), key) for key in range(20)]
    assert all(torch.equal(view, seeded(theirs, noise(32, 32), key)) for key, view in enumerate(views))
    assert len({view.numpy().tobytes() for view in views}) > 10


@pytest.mark.parametrize("crop", ["pad", "resize"])
def test_an_image_is_resized_only_if_its_size_differs(crop):
    still = build_transform(INPUTS, Augmentation(crop=crop, padding=0, hflip=0, color_jitter=0))
    exact = noise(32, 32)
    assert torch.equal(still(exact), transforms.functional.pil_to_tensor(exact))
    for size in (28, 8):
        small = noise(size, size)
        larger = transforms.functional.pil_to_tensor(small.resize((32, 32), Image.Resampling.BICUBIC))
        assert torch.equal(still(small), larger)
    wide = InputSettings((24, 36), INPUTS.mean, INPUTS.std, "bicubic", 1.0)
    assert build_transform(wide, Augmentation(crop=crop))(exact).shape == (3, 24, 36)


@pytest.mark.parametrize("crop", ["rkrc", "rkrr"])
def test_timms_crops_that_keep_the_shape(crop):
    view = build_transform(INPUTS, Augmentation(crop=crop))(noise())
    assert (view.shape, view.dtype) == ((3, 32, 32), torch.uint8)


@pytest.mark.parametrize("policy", ["rand-m10-n8-inc1", "rand-m0-n8", "rand-m14-n8-mmax20-inc1"])
def test_the_strongest_posterization_is_black_not_an_error(policy):
    strong = build_transform(INPUTS, Augmentation(auto_augment=policy))
    views = [seeded(strong, noise(), key) for key in range(60)]
    assert any((view == view[:, :1, :1]).all() for view in views)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_augment": "rnd-m9"}, "not a policy of timm; for example rand-m9-mstd0.5-inc1"),
        ({"scale": (1.0, 0.5)}, "the least and the greatest"),
        ({"ratio": (0.0, 1.0)}, "greater than 0"),
        ({"hflip": 1.5}, "less than or equal to 1"),
        ({"color_jitter": -1}, "greater than or equal to 0"),
        ({"crop": "paad"}, "'random_resized', 'pad'"),
        ({"flip": 1}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        Augmentation(**settings)


def test_randomness_is_put_back_even_after_an_error():
    before = random_states()

    def fail():
        with kept_randomness():
            seed_randomness(1, -2)
            random.random(), np.random.rand(), torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert random_states() == before


def test_seeds_survive_upgrades():
    # Written down once: a training resumed by a later version must see the views it would have seen.
    with kept_randomness():
        seed_randomness(1, 2, 3)
        drawn = random.randrange(10**6), np.random.randint(10**6), torch.randint(10**6, (1,)).item()
    assert drawn == (893982, 337022, 14846)


# What the device does.


def batch(n, views=1, size=(32, 32), number=0, classes=10):
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(256, (views * n, 3, *size), generator=generator).to(torch.uint8)
    labels = torch.randint(classes, (n,), generator=generator)
    return ImageBatch(images, labels, torch.arange(n), torch.empty(0, dtype=torch.int64), number)


def normalised(images, inputs):
    return transforms.functional.normalize(images.float() / 255, inputs.mean, inputs.std)


MIXED = Mixing(mixup=0.8, cutmix=1.0)


def test_each_model_gets_its_own_normalisation():
    one = batch(4)
    pixels = one.images.clone()
    views = DeviceViews(INPUTS, TEACHER, 10)(one, seed=0, step=0)
    torch.testing.assert_close(views.student, normalised(pixels, INPUTS))
    torch.testing.assert_close(views.teacher, normalised(pixels, TEACHER))
    assert torch.equal(one.images, pixels)
    assert torch.equal(views.labels, one.labels)
    assert views.soft is None


def test_no_teacher_and_a_teacher_with_the_same_input():
    assert DeviceViews(INPUTS, None, 10)(batch(4), seed=0, step=0).teacher is None
    views = DeviceViews(INPUTS, INPUTS, 10)(batch(4), seed=0, step=0)
    assert views.teacher is views.student


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("views", [1, 2])
def test_mixed_images_reach_teacher_and_student_alike(mode, channels_last, views):
    mixing = Mixing(mixup=0.8, cutmix=1.0, mode=mode)
    both = DeviceViews(
        INPUTS, TEACHER, 10, erasing=Erasing(probability=0.5), mixing=mixing, channels_last=channels_last
    )
    for step in range(4):
        seen = both(batch(6, views), seed=3, step=step)
        shown = seen.student * torch.tensor(INPUTS.std).view(3, 1, 1) + torch.tensor(INPUTS.mean).view(3, 1, 1)
        torch.testing.assert_close(seen.teacher, (shown - 0.5) / 0.5, rtol=1e-5, atol=1e-5)
        form = torch.channels_last if channels_last else torch.contiguous_format
        assert seen.student.is_contiguous(memory_format=form)
        assert seen.teacher.is_contiguous(memory_format=form)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_labels_are_shared_as_the_pixels_are(mode, kind):
    flat = ImageBatch(
        torch.tensor([0, 50, 100, 150, 200, 250], dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 32, 32),
        torch.arange(6),
        torch.arange(6),
        torch.empty(0, dtype=torch.int64),
    )
    plain = InputSettings((32, 32), (0.0,) * 3, (1.0,) * 3, "bicubic", 1.0)
    views = DeviceViews(plain, None, 6, mixing=Mixing(mode=mode, **kind))(flat, seed=0, step=1)
    mean = (views.soft * torch.tensor([0.0, 50, 100, 150, 200, 250]) / 255).sum(1)
    torch.testing.assert_close(views.student.mean((1, 2, 3)), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(views.soft.sum(1), torch.ones(6))
    assert (views.soft > 0).sum() > 6
    assert torch.equal(views.labels, views.soft.argmax(1))


def test_two_views_are_mixed_with_the_same_partner_and_share():
    one = batch(5, 1)
    twice = ImageBatch(one.images.repeat(2, 1, 1, 1), one.labels, one.rows, one.checks, one.number)
    for mode in ("batch", "pair", "elem"):
        device = DeviceViews(INPUTS, None, 10, mixing=Mixing(mixup=0.8, cutmix=1.0, mode=mode))
        alone, both = device(one, seed=0, step=2), device(twice, seed=0, step=2)
        assert torch.equal(both.student, alone.student.repeat(2, 1, 1, 1))
        assert torch.equal(both.soft, alone.soft)


def test_of_an_odd_number_the_last_stays_unmixed():
    for n in (1, 5):
        one = batch(n)
        views = DeviceViews(INPUTS, None, 10, mixing=Mixing(mixup=0.8))(one, seed=0, step=0)
        own = normalised(one.images, INPUTS)
        torch.testing.assert_close(views.student[-1], own[-1])
        assert views.soft[-1].tolist() == torch.eye(10)[one.labels[-1]].tolist()
        assert all(not torch.allclose(views.student[i], own[i]) for i in range(n // 2 * 2) if i != n // 2 * 2 - 1 - i)


def test_equal_shares_leave_an_image_its_own_label(monkeypatch):
    monkeypatch.setattr(np.random, "beta", lambda *_: 0.5)
    one = batch(6)
    views = DeviceViews(INPUTS, None, 10, mixing=Mixing(mixup=1.0))(one, seed=0, step=0)
    assert torch.equal(views.labels, one.labels)


def test_without_a_draw_nothing_is_mixed_but_shares_are_given():
    one = batch(4)
    views = DeviceViews(INPUTS, None, 10, mixing=Mixing(mixup=1.0, probability=0.0))(one, seed=0, step=0)
    assert torch.equal(views.soft, torch.nn.functional.one_hot(one.labels, 10).float())
    torch.testing.assert_close(views.student, normalised(one.images, INPUTS))
    assert DeviceViews(INPUTS, None, 10, mixing=Mixing())(one, seed=0, step=0).soft is None


@pytest.mark.parametrize("views", [1, 2])
def test_an_empty_micro_batch(views):
    empty = batch(0, views)
    device = DeviceViews(
        INPUTS, InputSettings((40, 40), *TEACHER_NORM), 10, erasing=Erasing(probability=1), mixing=MIXED
    )
    seen = device(empty, seed=0, step=0)
    assert (seen.student.shape, seen.teacher.shape) == ((0, 3, 32, 32), (0, 3, 40, 40))
    assert (seen.labels.shape, seen.soft.shape) == ((0,), (0, 10))


TEACHER_NORM = (TEACHER.mean, TEACHER.std, "bicubic", 1.0)


def test_a_teacher_of_another_size():
    one = batch(3)
    for size in ((48, 48), (16, 24)):
        views = DeviceViews(INPUTS, InputSettings(size, *TEACHER_NORM), 10)(one, seed=0, step=0)
        resized = torch.nn.functional.interpolate(one.images.float() / 255, size, mode="bicubic", antialias=True)
        torch.testing.assert_close(views.teacher, (resized - 0.5) / 0.5, rtol=1e-4, atol=1e-5)
        same = DeviceViews(INPUTS, InputSettings(size, INPUTS.mean, INPUTS.std), 10)(one, seed=0, step=0)
        torch.testing.assert_close(same.teacher, normalised(resized * 255, INPUTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_is_timms(mode):
    one = batch(8)
    device = DeviceViews(INPUTS, TEACHER, 10, erasing=Erasing(probability=0.7, mode=mode, count=2))
    views = device(one, seed=1, step=2)
    expected = normalised(one.images, INPUTS)
    with kept_randomness():
        seed_randomness(1, 2, 0, 0)
        RandomErasing(0.7, mode=mode, max_count=2, device="cpu")(expected)
    torch.testing.assert_close(views.student, expected)
    changed = ~torch.isclose(views.student, normalised(one.images, INPUTS), atol=1e-4)
    assert 0 < changed.any((1, 2, 3)).sum() < 8
    assert torch.equal(~torch.isclose(views.teacher, normalised(one.images, TEACHER), atol=1e-4), changed)
    for key in ({"seed": 1, "step": 3}, {"seed": 2, "step": 2}):
        assert not torch.equal(views.student, device(one, **key).student)


def test_draws_depend_on_the_number_and_leave_the_random_state_alone():
    device = DeviceViews(INPUTS, TEACHER, 10, erasing=Erasing(probability=1, mode="rand"), mixing=MIXED)
    before = random_states()
    first = batch(4)
    second = ImageBatch(first.images, first.labels, first.rows, first.checks, 1)
    assert not torch.equal(device(first, seed=0, step=0).student, device(second, seed=0, step=0).student)
    assert random_states() == before
    # Whatever the state was, what is seen is the same.
    seen = device(first, seed=0, step=0)
    random.random(), np.random.rand(), torch.rand(3)
    again = device(first, seed=0, step=0)
    assert torch.equal(seen.student, again.student)
    assert torch.equal(seen.soft, again.soft)


def test_images_of_half_precision_are_rounded_last():
    one = batch(4)
    exact = DeviceViews(INPUTS, TEACHER, 10, mixing=MIXED)(one, seed=0, step=0)
    half = DeviceViews(INPUTS, TEACHER, 10, mixing=MIXED, dtype=torch.bfloat16)(one, seed=0, step=0)
    assert torch.equal(half.student, exact.student.bfloat16())
    assert torch.equal(half.teacher, exact.teacher.bfloat16())
    assert half.soft.dtype == torch.float32


@pytest.mark.gpu
def test_a_cuda_device_keeps_its_random_state_and_repeats_itself():
    device = DeviceViews(INPUTS, TEACHER, 10, erasing=Erasing(probability=1, mode="pixel"), mixing=MIXED, device="cuda")
    one = batch(4).to("cuda")
    before = torch.cuda.get_rng_state()
    seen = device(one, seed=0, step=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.rand(3, device="cuda")
    assert torch.equal(device(one, seed=0, step=0).student, seen.student)
    assert not torch.equal(device(one, seed=0, step=1).student, seen.student)
