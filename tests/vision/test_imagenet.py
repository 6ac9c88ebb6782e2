"""The variants' classes, orders and right labels, as timm's own files have them."""

import pytest
import torch
from listed_images import Item, Listed, Says, numbered
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet

from data.errors import BadSample, UserError
from vision import imagenet
from vision.predict import Labels, predict

SYNSETS = ImageNetInfo().label_names()


@pytest.mark.parametrize(("name", "clean"), [("a", "val-a"), ("r", "val-r")])
def test_a_and_r_are_slices_of_the_thousand(name, clean):
    folders = sorted(imagenet._info(f"imagenet_{name}_synsets.txt").split())
    places = imagenet.indices(name)
    assert [SYNSETS[k] for k in places] == folders
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 1000, generator=generator)
    # What timm does: take the 200 columns, compare with the number of the folder.
    expected = float((logits[:, list(places)].argmax(-1) == torch.arange(200)).double().mean())
    variant = imagenet.open_variant(name, numbered(list(range(200)), folders))
    assert variant.source.classes == tuple(folders)
    labels = Labels(imagenet.outputs(folders, None), only_mapped=True)
    found = predict(Says(logits), variant.source, labels=labels).scores
    assert found["exact"] == expected

    # The clean score asks the same of those validation images whose class is among the 200.
    labels = [places[0], 0, places[7], 999, places[199]]
    val = imagenet.open_variant(clean, numbered(labels, SYNSETS))
    inside = [row for row, label in enumerate(labels) if label in places]
    assert len(val.source) == len(inside) < len(labels)
    found = predict(Says(logits), val.source, labels=Labels(imagenet.outputs(folders, None), True)).scores
    said = logits[inside][:, list(places)].argmax(-1)
    right = [places.index(labels[row]) for row in inside]
    assert found["exact"] == float((said == torch.tensor(right)).double().mean())
    assert val.source.line(len(inside) - 1) == 5


def test_v2_is_read_in_any_order_of_its_folders():
    scrambled = sorted(map(str, range(1000)))  # "0", "1", "10", "100", …
    source = numbered([scrambled.index("10"), scrambled.index("2"), scrambled.index("999")], scrambled)
    opened = imagenet.open_variant("v2", source).source
    assert [opened[row].label for row in range(3)] == [10, 2, 999]
    assert opened.classes == tuple(SYNSETS)


def test_real_takes_any_of_the_labels_and_leaves_empty_ones_out(tmp_path):
    labels = imagenet.real_labels()
    numbers = [next(k for k, found in enumerate(labels) if len(found) == n) for n in (0, 1, 2)] + [17, 49_999]
    names = [f"ILSVRC2012_val_{k + 1:08d}.JPEG" for k in numbers]
    source = numbered([0] * len(names), SYNSETS)
    for row, name in enumerate(names):
        source.items[row].image.save(tmp_path / name, "PNG")
        source.items[row] = Item(str(tmp_path / name), 0)
    logits = torch.zeros(len(names), 1000)
    for row, k in enumerate(numbers):
        # The last one is answered wrongly.
        answer = labels[k][-1] if labels[k] and row < 4 else next(j for j in range(1000) if j not in labels[k])
        logits[row, answer] = 9
    variant = imagenet.open_variant("real", source)
    found = predict(Says(logits), variant.source, labels=Labels(references=variant.references)).scores

    theirs = RealLabelsImagenet([f"ILSVRC2012_val_{k + 1:08d}.JPEG" for k in range(50_000)])
    for row, k in enumerate(numbers):
        theirs.sample_idx = k
        theirs.add_result(logits[row : row + 1])
    assert found["exact"] * 100 == theirs.get_accuracy(1) == 75
    assert found["skipped"] == {"no right label": 1}


def test_real_knows_images_by_their_names():
    with pytest.raises(BadSample, match="ILSVRC2012_val_00000001"):
        imagenet._real(Item("photo.jpg", 0))
    with pytest.raises(BadSample, match="ILSVRC2012_val_00000001"):
        imagenet._real(Item(b"bytes", 0))
    with pytest.raises(BadSample):
        imagenet._real(Item("ILSVRC2012_val_00050001.JPEG", 0))
    with pytest.raises(UserError, match="all 1,000 classes"):
        imagenet.open_variant("real", numbered([0], SYNSETS[:10]))


@pytest.mark.parametrize("name", ["val", "a", "r", "val-a", "sketch", "v2", "c"])
def test_a_class_of_another_set_is_refused(name):
    with pytest.raises(UserError, match="class nonsense is none of ImageNet") as error:
        imagenet.open_variant(name, numbered([0], ["nonsense"]))
    assert "\n" not in str(error.value)


def test_outputs_are_found_by_synset_or_in_the_usual_order():
    assert imagenet.outputs(SYNSETS[5:7], None) == [5, 6]
    assert imagenet.outputs(SYNSETS[5:7], SYNSETS[::-1]) == [994, 993]
    assert imagenet.outputs(SYNSETS[5:7], [f"name {k}" for k in range(1000)]) == [5, 6]
    with pytest.raises(UserError, match="has no class goldfish"):
        imagenet.outputs(SYNSETS[:2], SYNSETS[:1])


def test_synsets_are_written_out():
    assert imagenet.readable(["n01440764", "cat"]) == ("tench", "cat")
    assert {"crane (n02012849)", "crane (n03126707)"} <= set(imagenet.readable(SYNSETS))
    assert len(set(imagenet.readable(SYNSETS))) == 1000
    assert not set(imagenet.readable(SYNSETS)) & set(SYNSETS)


def test_corruptions_are_found_in_both_layouts(tmp_path):
    for path in ("fog/1/n01440764", "fog/3/n01440764", "noise/shot_noise/5/n01440764", "notes"):
        (tmp_path / path).mkdir(parents=True)
    found = imagenet.corruption_folders(tmp_path)
    assert [(name, severity) for name, severity, _ in found] == [("fog", 1), ("fog", 3), ("shot_noise", 5)]
    with pytest.raises(UserError, match="ImageNet-C"):
        imagenet.corruption_folders(tmp_path / "notes")


def test_mean_corruption_error():
    def of(exact):
        return {"n": 10, "exact": exact, "top5": 1.0, "nll": 0.5, "ece": 0.1}

    some = imagenet.corruption_scores({("fog", 1): of(0.5), ("fog", 3): of(0.25), ("snow", 2): of(1.0)})
    assert some["exact"] == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert some["by_type"]["fog"] == {"n": 20, "exact": 0.375}
    assert some["corruptions"] == {"fog": {"1": 0.5, "3": 0.25}, "snow": {"2": 1.0}}
    assert some["mce"] is None

    # AlexNet's own errors come to 100, half of them to 50.
    for factor in (1, 0.5):
        alike = {(name, s): of(1 - factor * e) for name, e in imagenet._ALEXNET.items() for s in range(1, 6)}
        assert imagenet.corruption_scores(alike)["mce"] == pytest.approx(100 * factor)
    assert len(imagenet._ALEXNET) == 15


def validation(shift=0, first=0):
    """The first 60 validation images with one of ReaL's labels each, as numbers that are off by ``shift``."""
    right = [(row, found[0]) for row, found in enumerate(imagenet.real_labels()[:60]) if found]
    items = [Item(f"ILSVRC2012_val_{row + 1:08d}.JPEG", (label + shift) % 1000) for row, label in right]
    return Listed(items, map(str, range(first, first + 1000))), [label for _, label in right]


@pytest.mark.parametrize("name", ["val", "real"])
def test_numbers_of_validation_images_are_the_usual_order(name):
    source, right = validation()
    opened = imagenet.open_variant(name, source).source
    assert opened.classes == tuple(SYNSETS)
    assert [opened[row].label for row in range(len(right))] == right


@pytest.mark.parametrize(
    ("shift", "first", "message"),
    [
        (
            1,
            0,
            "not ImageNet's classes in the usual order .*put classes.txt beside the list: the synset",
        ),
        (0, 1, "class 1000 is none of ImageNet; put classes.txt beside the list: the synset of each of its numbers"),
    ],
)
def test_numbers_in_another_order_ask_for_the_classes(shift, first, message):
    with pytest.raises(UserError, match=message):
        imagenet.open_variant("val", validation(shift, first)[0])
