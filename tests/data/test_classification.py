"""Class folders, lists and Hugging Face data sets give the same labelled images; mistakes are one-line errors."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from data.classification import open_images
from data.errors import BadSample, UserError
from data.images import load_image
from data.labelled import Texts, class_order, labels_of

NAMES = tuple(f"class{number}" for number in range(10))


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def grow(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def rows(source):
    """Return the red value of each image, which identifies it, and the name of its class."""
    samples = [source[row] for row in range(len(source))]
    return [(load_image(s.image).getpixel((0, 0))[0], source.classes[s.label]) for s in samples]


@pytest.fixture
def folder(tmp_path):
    """Ten classes of two images each; image ``n`` is red ``n`` and of class ``n % 10``."""
    return grow(tmp_path / "set", {f"class{n % 10}/{n:02d}.png": png(n) for n in range(20)})


SORTED = [(number + more, NAMES[number]) for number in range(10) for more in (0, 10)]


# Folders.


def test_class_folders(folder):
    source = open_images(folder)
    assert source.name == "set"
    assert source.classes == NAMES
    assert rows(source) == SORTED
    assert (source.line(3), source.size(3)) == (4, 1)
    assert source[-1].label == 9
    with pytest.raises(IndexError):
        source[20]


def test_nested_images_hidden_files_and_empty_classes(folder):
    grow(folder, {"class0/more/deep/99.JPEG": png(99), "class0/.hidden.png": b"", "class0/notes.md": b""})
    grow(folder, {".git/x/1.png": png(1), "class0/._00.png": b"", "README.md": b""})
    (folder / "empty").mkdir()
    source = open_images(folder)
    assert source.classes == (*NAMES, "empty")
    assert rows(source) == [*SORTED[:2], (99, "class0"), *SORTED[2:]]


def test_numbered_folders_count(tmp_path):
    grow(tmp_path, {f"{number}/a.png": png(number) for number in (0, 1, 2, 10, 100)})
    assert open_images(tmp_path).classes == ("0", "1", "2", "10", "100")
    grow(tmp_path, {"n01/a.png": png(7)})
    assert open_images(tmp_path).classes == ("0", "1", "10", "100", "2", "n01")
    assert class_order(["10", "9", "09"]) == ("09", "9", "10")


def test_splits_of_folders(tmp_path):
    files = {f"{split}/{one}/a.png": png(1) for split in ("train", "validation") for one in ("cat", "dog")}
    grow(tmp_path, files | {"devkit/readme.txt": b""})
    for split in ("val", "validation", "valid"):
        assert open_images(tmp_path, split=split).classes == ("cat", "dog")
    with pytest.raises(UserError, match="several splits; set `split` to one of train, validation"):
        open_images(tmp_path)
    with pytest.raises(UserError, match="no split 'test'"):
        open_images(tmp_path, split="test")


def test_only_split_is_chosen_and_a_class_may_be_called_train(tmp_path):
    only = grow(tmp_path / "a", {"train/cat/a.png": png(1)})
    assert open_images(only).classes == ("cat",)
    vehicles = grow(tmp_path / "b", {"train/a.png": png(1), "plane/a.png": png(2)})
    assert open_images(vehicles).classes == ("plane", "train")


def test_links_are_followed_and_loops_refused(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "cat").symlink_to(folder / "class3")
    (linked / "dog").mkdir()
    (linked / "dog" / "1.png").symlink_to(folder / "class1" / "01.png")
    assert rows(open_images(linked)) == [(3, "cat"), (13, "cat"), (1, "dog")]
    with pytest.raises(BadSample, match="outside the roots"):
        load_image(open_images(linked)[0].image, roots=[linked])
    (linked / "dog" / "again").symlink_to(linked)
    with pytest.raises(UserError, match="link to a folder it is in"):
        open_images(linked, format="folder")


def test_limit_leaves_classes(folder):
    source = open_images(folder, limit=3)
    assert len(source) == 3
    assert source.classes == NAMES


def test_names_need_not_be_utf_8(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/set/\xff")
    with open(os.fsencode(tmp_path) + b"/set/\xff/\xfe.png", "wb") as file:
        file.write(png(5))
    assert load_image(open_images(tmp_path / "set")[0].image).getpixel((0, 0)) == (5, 0, 0)


def test_texts():
    texts = Texts(["", "é", "abc"])
    assert list(texts) == ["", "é", "abc"]
    assert texts[-1] == "abc"
    assert list(pickle.loads(pickle.dumps(texts))) == list(texts)


# Lists.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "class1/01.png 1\nclass0/00.png   0\n"),
        ("a.txt", "class1/01.png\t1\n\nclass0/00.png\t0"),
        ("a.csv", "﻿path,label\r\nclass1/01.png,1\r\nclass0/00.png,0\r\n"),
        ("a.csv", '"class1/01.png","1"\n"class0/00.png", 0\n'),
    ],
)
def test_lists(folder, name, content):
    (folder / name).write_text(content)
    source = open_images(folder / name)
    assert rows(source) == [(1, "1"), (0, "0")]
    assert source.classes == ("0", "1")
    assert source[0].label == 1


def test_names_without_suffix_are_no_header(folder):
    (folder / "a").write_bytes(png(1))
    for header in ("", "image label\n"):
        (folder / "val.txt").write_text(f"{header}a 0\nclass2/02.png 1\n")
        assert rows(open_images(folder / "val.txt")) == [(1, "0"), (2, "1")]


def test_list_lines_and_names_of_classes(folder):
    (folder / "val.txt").write_text("class1/01.png,tabby cat\n\nclass2/02.png,dog\nclass3/03.png,0\n")
    source = open_images(folder / "val.txt")
    assert source.classes == ("0", "dog", "tabby cat")
    assert [source.line(row) for row in range(3)] == [1, 3, 4]
    (folder / "classes.txt").write_text("tabby cat\ndog\n")
    assert rows(open_images(folder / "val.txt")) == [(1, "tabby cat"), (2, "dog"), (3, "tabby cat")]


@pytest.mark.parametrize(
    ("where", "content"),
    [
        ("val_annotations.txt", "01.png\tn01\t0\t32\t44\t62\n02.png\tn02\t1\t1\t9\t9\n"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\n03,n01 85 1 499 272 \n04,n02 1 1 2 2 n02 3 3 4 4\n"),
        ("swapped.csv", "label,image\nn01,01.png\nn02,02.png\n"),
    ],
)
def test_lists_as_other_sets_have_them(tmp_path, where, content):
    grow(tmp_path, {f"images/{n:02d}.png": png(n) for n in (1, 2)})
    grow(tmp_path, {f"ILSVRC/Data/CLS-LOC/val/{n:02d}.JPEG": png(n - 2) for n in (3, 4)})
    (tmp_path / where).write_text(content)
    assert rows(open_images(tmp_path / where)) == [(1, "n01"), (2, "n02")]


def test_a_folder_of_tiny_imagenets_validation_images_is_not_one_class(tmp_path):
    grow(tmp_path, {f"images/val_{n}.JPEG": png(n) for n in (1, 2)})
    (tmp_path / "val_annotations.txt").write_text("val_1.JPEG\tn01\t0\t1\t2\t3\nval_2.JPEG\tn02\t0\t1\t2\t3\n")
    assert rows(open_images(tmp_path)) == [(1, "n01"), (2, "n02")]


MAPPED = b"n02 2 dog\nn01 1 cat\nn03 3 owl\n"


@pytest.mark.parametrize(
    "beside",
    [{"classes.txt": b"n01\nn02\nn03\n"}, {"map_clsloc.txt": MAPPED}, {"classes.txt": b"n00000001 a\nn00000002 b\n"}],
)
def test_a_devkits_ground_truth_counts_from_one_in_the_order_of_names(tmp_path, beside):
    grow(tmp_path, {"val_2.JPEG": png(2), "val_1.JPEG": png(1), **beside})
    (tmp_path / "ground_truth.txt").write_text("2\r\n1\r\n")
    found = rows(open_images(tmp_path / "ground_truth.txt"))
    assert [(red, name[-1]) for red, name in found] == [(1, "2"), (2, "1")]


def test_a_devkits_own_file_of_classes_is_read(tmp_path):
    io = pytest.importorskip("scipy.io")
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(2, "n02", 0), (1, "n01", 0), (1001, "n09", 2)], dtype=kinds)
    grow(tmp_path, {"val_1.JPEG": png(1), "val_2.JPEG": png(2)})
    io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    (tmp_path / "ground_truth.txt").write_text("2\n1\n")
    assert rows(open_images(tmp_path / "ground_truth.txt")) == [(1, "n02"), (2, "n01")]
    (tmp_path / "meta.mat").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="not the devkit's file"):
        open_images(tmp_path / "ground_truth.txt")


def test_numbers_of_named_classes_may_count_from_one(folder):
    (folder / "classes.txt").write_text("cat\ndog\n")
    for numbers, names in (("12", ["cat", "dog"]), ("01", ["cat", "dog"]), ("11", ["dog", "dog"])):
        (folder / "val.txt").write_text(f"class1/01.png {numbers[0]}\nclass2/02.png {numbers[1]}\n")
        assert [name for _, name in rows(open_images(folder / "val.txt"))] == names


def test_an_open_quotation_mark_ends_with_its_line(folder):
    (folder / "val.csv").write_text('"class0/00.png,1\nclass1/01.png,1\n')
    source = open_images(folder / "val.csv")
    assert len(source) == 2
    assert source[1].label == 1


def test_wrong_labels_are_bad_samples(folder):
    (folder / "classes.txt").write_text("a\nb\n")
    (folder / "val.csv").write_text(
        "class0/00.png,b\nclass1/01.png,2\nclass2/02.png,\nclass3/03.png,-1\nclass4/04.png\n"
    )
    source = open_images(folder / "val.csv")
    assert source[0].label == 1
    for row, message in ((1, "outside the classes: 2; there are 2"), (2, "^no label$"), (3, "-1"), (4, "^no label$")):
        with pytest.raises(BadSample, match=message):
            source[row]


def test_labels_by_number_or_name():
    labels = labels_of(["3", "03", " 1 ", None, "", "x", "9999999999"], None)
    assert labels.classes == ("0", "1", "2", "3")
    assert [labels[row] for row in range(3)] == [3, 3, 1]
    for row, message in ((3, "no label"), (4, "no label"), (5, "x; there are 4"), (6, "9999999999")):
        with pytest.raises(BadSample, match=message):
            labels[row]
    assert labels_of(["b", "10", "a"], None).classes == ("10", "a", "b")


# Hugging Face data sets.


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def dataset(datasets, labels, feature, images=None, **more):
    images = images or [{"bytes": png(n), "path": None} for n in range(len(labels))]
    features = datasets.Features({"img": datasets.Image(), "fine": feature} | dict.fromkeys(more, feature))
    return datasets.Dataset.from_dict({"img": images, "fine": labels, **more}, features=features)


def test_hugging_face(datasets, tmp_path):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    dataset(datasets, [1, 0, None], feature).save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "saved")
    assert isinstance(source[0].image, bytes)
    assert source.classes == ("cat", "dog")
    with pytest.raises(BadSample, match="no label"):
        source[2]
    assert rows(pickle.loads(pickle.dumps(open_images(tmp_path / "saved", limit=2)))) == [(0, "dog"), (1, "cat")]


def test_hugging_face_columns(datasets, tmp_path):
    feature = datasets.ClassLabel(names=["cat", "dog"])
    dataset(datasets, [1, 0], feature, coarse=[0, 0]).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="2 columns of the type ClassLabel; set label_key to one of fine, coarse"):
        open_images(tmp_path / "two")
    assert rows(open_images(tmp_path / "two", label_key="coarse")) == [(0, "cat"), (1, "cat")]
    with pytest.raises(UserError, match="no column 'x'"):
        open_images(tmp_path / "two", label_key="x")


@pytest.mark.parametrize(("labels", "kind", "classes"), [([2, 0], "int64", "012"), (["b", "a"], "string", "ab")])
def test_hugging_face_labels_without_names(datasets, tmp_path, labels, kind, classes):
    images = [str(tmp_path / "a.png"), None]
    grow(tmp_path, {"a.png": png(7)})
    table = dataset(datasets, labels, datasets.Value(kind), images)
    splits = datasets.DatasetDict({"validation": table, "train": table})
    splits.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no column of the type ClassLabel"):
        open_images(tmp_path / "saved", split="val")
    source = open_images(tmp_path / "saved", split="val", label_key="fine")
    assert source.classes == tuple(classes)
    assert rows(open_images(tmp_path / "saved", split="val", label_key="fine", limit=1)) == [(7, str(labels[0]))]
    with pytest.raises(BadSample, match="sample without image"):
        source[1]


# Mistakes.


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere", {}, "do not exist; check the path"),
        ("set", {"limit": 0}, "at least 1"),
        ("set", {"format": "zip"}, "known are auto, folder, list"),
        ("set", {"config": "a"}, "has no config"),
        ("set", {"label_key": "a"}, "has no columns"),
        ("set", {"split": "val"}, "no folder 'val'; leave `split` out"),
        ("set", {"format": "cifar"}, "no files of CIFAR"),
        ("set", {"format": "idx"}, "no IDX images"),
        ("set", {"format": "tar"}, "no .tar files"),
        ("set", {"format": "list"}, "Is a directory; check the path"),
        ("set/class0", {"format": "folder"}, "it has no folders"),
        ("set/class0", {}, "in no class folders; write a list"),
        ("flat", {}, "in no class folders; name the list, such as .*flat/val.txt"),
        ("flat/val.txt", {}, "Put classes.txt beside it, .* 1,000 synsets"),
        ("uneven/val.txt", {}, "has 2 labels, but .*uneven 1 images"),
        ("alone/val.txt", {}, "copy it into the folder of its images"),
        ("list.txt", {"format": "folder"}, "Not a directory; check the path"),
        ("list.txt", {"format": "idx"}, "Not a directory; check the path"),
        ("list.txt", {"format": "tar"}, "is truncated, broken or compressed"),
        ("set/class0/00.png", {}, "cannot tell the format"),
        ("none", {}, "no images found in .*none; looked for .avif, .bmp"),
        ("none", {"format": "folder"}, "no images found in the folders of .*none; looked for .avif"),
        ("a.tar.gz", {}, "only plain .tar files"),
        ("list.txt", {"split": "val"}, "has no splits"),
        ("wide.csv", {}, "line 2 has 3 columns"),
        ("empty.txt", {}, "names no images"),
        ("latin.txt", {}, "not UTF-8"),
        ("both", {}, "may be read as folder or tar; set `format`"),
        ("set/*.tar", {}, "no files match"),
        ("twice/list.txt", {}, "names the class 'a' twice"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, path, options, message):
    grow(
        tmp_path,
        {
            "none/cat/notes.md": b"",
            "a.tar.gz": b"",
            "list.txt": b"a.png 1",
            "wide.csv": b"a.png,1\nb.png,1,2",
            "empty.txt": b"\n",
            "latin.txt": b"\xff.png 1",
            "both/cat/a.png": b"",
            "both/a.tar": b"",
            "flat/a.png": b"",
            "flat/val.txt": b"490\n",
            "uneven/a.png": b"",
            "uneven/val.txt": b"1\n2\n",
            "uneven/classes.txt": b"a\nb\n",
            "alone/val.txt": b"1\n",
            "alone/classes.txt": b"a\n",
            "twice/list.txt": b"a.png 1",
            "twice/classes.txt": b"a\na\n",
        },
    )
    with pytest.raises(UserError, match=message) as caught:
        open_images(tmp_path / path, **options)
    assert "\n" not in str(caught.value)
