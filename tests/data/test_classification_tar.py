"""Images are read from tar files in place, the same in every process; errors name a broken or changed tar."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import tar_images, tars
from data.classification import open_images
from data.errors import BadSample, UserError
from data.images import load_image
from data.labelled import LabelledImage


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlm-distill" / "tar-index"


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path, members, **options):
    """A tar of (name, bytes) pairs, at a path or as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def shard(path, numbers):
    return tar(path, [(f"{n:04d}.{field}", content) for n in numbers for field, content in sample(n)])


def sample(number):
    return ("png", png(number)), ("cls", str(number % 10).encode())


def rows(source):
    samples = [source[row] for row in range(len(source))]
    return [(load_image(s.image).getpixel((0, 0))[0], source.classes[s.label]) for s in samples]


# WebDataset.


def test_shards_by_folder_pattern_and_range(tmp_path):
    for number in range(3):
        shard(tmp_path / "set" / f"part-{number:03d}.tar", range(10 * number, 10 * number + 10))
    expected = [(n, str(n % 10)) for n in range(30)]
    for path in ("set", "set/part-*.tar", "set/part-{000..002}.tar"):
        source = open_images(tmp_path / path)
        assert rows(source) == expected
        assert source.name == ("set" if path == "set" else "part")
        assert source.classes == tuple("0123456789")
    assert rows(open_images(tmp_path / "set" / "part-{001..001}.tar", limit=2)) == [expected[10], expected[15]]
    assert isinstance(source[0].image, bytes)
    with pytest.raises(UserError, match=r"part-003\.tar cannot be read"):
        open_images(tmp_path / "set" / "part-{000..003}.tar")


def test_keys_and_fields(tmp_path):
    tar(
        tmp_path / "a.tar",
        [
            ("./a/1.PNG", png(1)),  # fields in lower case, ./ does not count
            ("./a/1.cls", b" 3\n"),
            ("b/1.cls", b"2"),  # the folder is part of the key, and order does not matter
            ("b/1.jpg", png(2)),
            ("c.d/1.x.png", png(9)),  # the field is x.png, not png
            ("c.d/1.png", png(3)),
            ("c.d/1.json", b'{"label": 1, "other": 0}'),
            ("2.png", png(4)),
            ("2.txt", b"0"),
            ("2.png", png(5)),  # a field that comes again begins a sample
            ("2.cls", b"1"),
            ("README.md", b"hello"),  # neither image nor label
        ],
    )
    assert rows(open_images(tmp_path / "a.tar")) == [(1, "3"), (2, "2"), (3, "1"), (4, "0"), (5, "1")]


def test_bad_samples(tmp_path):
    members = [("0.png", png(0)), ("0.cls", b"0"), ("1.png", png(1)), ("2.cls", b"0"), ("3.png", png(3))]
    tar(tmp_path / "a.tar", [*members, ("3.cls", b"cat"), ("4.png", png(4)), ("4.json", b"{"), ("5.png", b"x")])
    (tmp_path / "classes.txt").write_text("dog\n")
    source = open_images(tmp_path / "a.tar")
    assert rows(open_images(tmp_path / "a.tar", limit=1)) == [(0, "dog")]
    for row, message in ((1, "no label"), (2, "without image"), (3, "cat; there are 1"), (4, "no label")):
        with pytest.raises(BadSample, match=message):
            source[row]


def test_chosen_fields(tmp_path):
    members = [("0.left.png", png(1)), ("0.png", png(2)), ("0.json", json.dumps({"fine": "cat", "label": 5}).encode())]
    tar(tmp_path / "a.tar", members)
    assert rows(open_images(tmp_path / "a.tar")) == [(2, "5")]
    assert rows(open_images(tmp_path / "a.tar", image_key="left.png", label_key="fine")) == [(1, "cat")]
    with pytest.raises(UserError, match=r"no images found in .*looked for field 'x'"):
        open_images(tmp_path / "a.tar", image_key="x")
    with pytest.raises(UserError, match=r"no labels found in .*looked for fields 'x'"):
        open_images(tmp_path / "a.tar", label_key="x")


def test_splits_of_shards(tmp_path):
    for number, split in enumerate(("train", "train", "validation")):
        shard(tmp_path / "a" / f"set-{split}-{number:02d}.tar", [number])
        shard(tmp_path / "b" / split / f"{number:02d}.tar", [number])
    for folder in ("a", "b"):
        assert rows(open_images(tmp_path / folder, split="train")) == [(0, "0"), (1, "1")]
        assert [red for red, _ in rows(open_images(tmp_path / folder, split="val"))] == [2]
        with pytest.raises(UserError, match="several splits"):
            open_images(tmp_path / folder)
    with pytest.raises(UserError, match="no split 'val'"):
        open_images(tmp_path / "b" / "train", split="val")


def test_a_class_may_be_called_train(tmp_path):
    for number, one in enumerate(("plane", "train")):
        tar(tmp_path / "set" / f"{one}.tar", [("1.png", png(number))])
    assert rows(open_images(tmp_path / "set")) == [(0, "plane"), (1, "train")]


# Folders of classes in tars.


@pytest.mark.parametrize("options", [{"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}])
def test_class_folders_in_a_tar(tmp_path, options):
    long = "x" * 120  # needs a header of its own
    members = [("train/cat/1.JPEG", png(1)), (f"train/dog/{long}.b.png", png(2)), ("train/dog/.2.png", b"")]
    tar(tmp_path / "train.tar", [*members, ("train/cat/3.png", png(3)), ("train/labels.csv", b"")], **options)
    assert rows(open_images(tmp_path / "train.tar")) == [(1, "cat"), (2, "dog"), (3, "cat")]


def test_a_tar_of_tars_of_classes_and_a_folder_of_them(tmp_path):
    classes = {"n02": [3, 4], "n01": [1, 2]}
    inner = {one: [(f"{one}_{n}.JPEG", png(n)) for n in numbers] for one, numbers in classes.items()}
    tar(tmp_path / "ILSVRC2012_img_train.tar", [(f"{one}.tar", tar(None, members)) for one, members in inner.items()])
    source = open_images(tmp_path / "ILSVRC2012_img_train.tar")
    assert source.classes == ("n01", "n02")
    assert rows(source) == [(3, "n02"), (4, "n02"), (1, "n01"), (2, "n01")]
    for one, members in (inner | {"n07": [("7.JPEG", png(7))]}).items():
        tar(tmp_path / "set" / f"{one}.tar", members)
    assert rows(open_images(tmp_path / "set")) == [(1, "n01"), (2, "n01"), (3, "n02"), (4, "n02"), (7, "n07")]


@pytest.mark.parametrize("names", [["a"], ["train-000", "train-001"]])
def test_images_without_labels(tmp_path, names):
    for name in names:
        tar(tmp_path / "set" / f"{name}.tar", [("1.png", png(1))])
    with pytest.raises(UserError, match="no labels found"):
        open_images(tmp_path / "set", split="train" if len(names) > 1 else None)


# Broken tars.


def test_truncated_anywhere(tmp_path):
    whole = shard(tmp_path / "whole.tar", range(3))
    assert len(rows(open_images(tmp_path / "whole.tar"))) == 3
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the mark of the end begins here
    for size in (0, 100, 512, 600, 1024, end - 512, end - 100, end):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar is truncated") as caught:
            open_images(tmp_path / "cut.tar")
        assert "\n" not in str(caught.value)
    broken = bytearray(whole)
    broken[1024 : 1024 + 100] = b"\xff" * 100  # the second header
    (tmp_path / "cut.tar").write_bytes(broken)
    with pytest.raises(UserError, match=r"cut\.tar is truncated"):
        open_images(tmp_path / "cut.tar")


def test_truncated_inner_tar(tmp_path):
    inner = tar(None, [("1.png", png(1)), ("2.png", png(2))])
    tar(tmp_path / "a.tar", [("n01.tar", inner), ("n02.tar", inner[:1536]), ("n03.tar", inner)])
    with pytest.raises(UserError, match=r"a\.tar at byte \d+ is truncated"):
        open_images(tmp_path / "a.tar")


def test_compressed_and_linked(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as file:
        file.addfile(tarfile.TarInfo("x.png"))
    with pytest.raises(UserError, match="compressed"):
        open_images(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        info = tarfile.TarInfo("cat/x.png")
        info.type, info.linkname = tarfile.LNKTYPE, "cat/y.png"
        file.addfile(info)
    with pytest.raises(UserError, match="link to another member"):
        open_images(tmp_path / "b.tar")


# The index.


def test_the_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch, cache):
    made = []
    index = tar_images._index
    monkeypatch.setattr(tar_images, "_index", lambda *given: made.append(given) or index(*given))
    path = tmp_path / "a.tar"
    shard(path, range(3))
    first = rows(open_images(path))
    assert rows(open_images(path)) == first
    assert len(made) == 1
    before = path.stat()
    shard(path, (5, 6, 7))  # the same size
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert [red for red, _ in rows(open_images(path))] == [5, 6, 7]
    open_images(path, label_key="cls")  # another question, another index
    assert len(made) == 3
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert [red for red, _ in rows(open_images(path))] == [5, 6, 7]
    assert len(made) == 4


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    shard(tmp_path / "a.tar", range(3))
    assert len(open_images(tmp_path / "a.tar")) == 3


def test_a_shard_that_changes_under_way(tmp_path):
    path = tmp_path / "a.tar"
    shard(path, range(3))
    source = open_images(path)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"a\.tar has changed since it was indexed"):
        source[0]


# Processes.


class Reads(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row) -> LabelledImage:
        sample = self.source[row]
        return sample.image, sample.label


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_one_tar(tmp_path, start):
    random = np.random.default_rng(0)
    contents = [random.bytes(int(random.integers(1, 200_000))) for _ in range(60)]
    members = [(f"{n}.{f}", c) for n, content in enumerate(contents) for f, c in (("jpg", content), ("cls", b"%d" % n))]
    tar(tmp_path / "a.tar", members)
    source = open_images(tmp_path / "a.tar")
    assert source[3].image == contents[3]  # workers inherit the open file
    loader = torch.utils.data.DataLoader(
        Reads(source), batch_size=None, num_workers=2, multiprocessing_context=start, shuffle=True
    )
    read = {int(label): image for image, label in loader}
    assert read == dict(enumerate(contents))


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_OPEN_SHARDS", 2)
    for number in range(5):
        shard(tmp_path / "set" / f"{number}.tar", [number])
    source = open_images(tmp_path / "set")

    def tars_open():
        # Only these: files that earlier tests left open may be closed meanwhile.
        links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
        return sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink())

    assert tars_open() == 0
    assert [red for red, _ in rows(source)] == [0, 1, 2, 3, 4]
    assert tars_open() == 2
    copy = pickle.loads(pickle.dumps(source))
    assert tars_open() == 2
    assert rows(copy) == rows(source)
