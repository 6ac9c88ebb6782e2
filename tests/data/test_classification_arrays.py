"""CIFAR's binaries and pickles and IDX files give the images they were made of; no pickle runs code."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest

from data.classification import open_images
from data.errors import BadSample, UserError
from data.images import load_image
from data.plain_pickle import read_plain_pickle

TEN = tuple(f"name{number}" for number in range(10))
HUNDRED = tuple(f"name{number}" for number in range(100))


def values(n, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, 3072), dtype=np.uint8), random.integers(0, 10, n).tolist()


def write_ten(folder, how, protocol=2):
    """Files as the published ones: rows of red, green and blue planes."""
    folder.mkdir()
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"]):
        write_batch(folder / name, how, number, protocol)
    write_batch(folder / "test_batch", how, 9, protocol)
    if how == "binary":
        (folder / "batches.meta.txt").write_text("\n".join([*TEN, "", ""]))
    else:
        meta = {b"label_names": [name.encode() for name in TEN], b"num_vis": 3072}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
    return folder


def write_batch(path, how, seed, protocol):
    pixels, labels = values(3, seed)
    if how == "binary":
        path.with_name(path.name + ".bin").write_bytes(np.insert(pixels, 0, labels, 1).tobytes())
    else:
        content = {"batch_label": "training batch", "labels": labels, "data": pixels, "filenames": ["a.png"] * 3}
        path.write_bytes(pickle.dumps({key.encode(): value for key, value in content.items()}, protocol))


def arrays(source):
    samples = [source[row] for row in range(len(source))]
    return np.stack([np.asarray(load_image(s.image)) for s in samples]), [source.classes[s.label] for s in samples]


@pytest.mark.parametrize(("how", "protocol"), [("binary", 0), ("pickle", 0), ("pickle", 2), ("pickle", 4)])
def test_cifar_10(tmp_path, how, protocol):
    source = open_images(write_ten(tmp_path / "cifar", how, protocol), split="train")
    assert source.classes == TEN
    images, names = arrays(source)
    pixels = np.concatenate([values(3, seed)[0] for seed in range(5)])
    np.testing.assert_array_equal(images, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert names == [TEN[label] for seed in range(5) for label in values(3, seed)[1]]
    test, _ = arrays(open_images(tmp_path / "cifar", split="test", limit=2))
    np.testing.assert_array_equal(test, values(3, 9)[0][:2].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(arrays(pickle.loads(pickle.dumps(source)))[0], images)
    with pytest.raises(UserError, match="several splits; set `split` to one of train, test"):
        open_images(tmp_path / "cifar")


def test_a_pickle_of_python_2(tmp_path):
    """Opcodes as cPickle of Python 2 wrote them: 8-bit strings and the old name of NumPy's module."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"K" + bytes([value])

    pixels, _ = values(2)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        b"(" + number(1) + number(2) + b"M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
        b"(" + number(3) + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff" + number(0) + b"tb"
        b"\x89T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    )
    labels = b"](" + number(3) + number(99) + b"e"
    body = b"(" + text(b"data") + array + text(b"fine_labels") + labels + b"u"
    (tmp_path / "test").write_bytes(b"\x80\x02}" + body + b".")
    images, names = arrays(open_images(tmp_path))
    np.testing.assert_array_equal(images, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert names == ["3", "99"]


def test_cifar_100_has_fine_labels(tmp_path):
    pixels, labels = values(4)
    coarse = [7] * 4
    binary, pickled = tmp_path / "binary", tmp_path / "pickled"
    binary.mkdir()
    pickled.mkdir()
    (binary / "train.bin").write_bytes(np.hstack([np.array([coarse, labels], np.uint8).T, pixels]).tobytes())
    (binary / "fine_label_names.txt").write_text("\n".join(HUNDRED))
    content = {"data": np.asfortranarray(pixels), "fine_labels": labels, "coarse_labels": coarse}
    (pickled / "train").write_bytes(pickle.dumps(content))
    (pickled / "meta").write_bytes(pickle.dumps({"fine_label_names": list(HUNDRED)}))
    one, other = open_images(binary), open_images(pickled, split="train")
    assert one.classes == other.classes == HUNDRED
    np.testing.assert_array_equal(arrays(one)[0], arrays(other)[0])
    assert arrays(one)[1] == arrays(other)[1] == [HUNDRED[label] for label in labels]


class Evil:
    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_pickle_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "ran"
    evil = Evil(os.system, f"touch {mark}")
    for content in ({"data": evil}, {"data": [Evil(eval, "1")]}, {"x": Evil(getattr, {}, "get")}):
        (tmp_path / "test").write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match="do not trust this file") as caught:
            open_images(tmp_path)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cnumpy\nndarray.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
        b"Ptext\n.",
        b"\x80\x02\x82\x01.",
        b"cnumpy\ndtype\n(S'u1'\ntRc_codecs\nencode\nb.",  # a state that is no state
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # the place 2**31 - 1 of a table
        b"(c_codecs\nencode\n(NS'__new__'\ncnumpy\ndtype\nd\x86b.",  # would change a stand-in
        b"",
        b"garbage",
        b"].",
    ],
)
def test_broken_and_hostile_pickles_are_mistakes(tmp_path, body):
    (tmp_path / "test").write_bytes(body)
    with pytest.raises(UserError, match=r"test") as caught:
        open_images(tmp_path)
    assert "\n" not in str(caught.value)


def test_only_byte_arrays(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"data": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match="another type than uint8"):
        read_plain_pickle(tmp_path / "a")
    (tmp_path / "a").write_bytes(pickle.dumps({"data": np.array([None])}))
    with pytest.raises(UserError, match="another type than uint8"):
        read_plain_pickle(tmp_path / "a")


def test_what_is_wrong_with_cifar(tmp_path):
    folder = write_ten(tmp_path / "cifar", "binary")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3\.bin is missing"):
        open_images(folder, split="train")
    (folder / "test_batch.bin").write_bytes(bytes(3073 + 3072))
    with pytest.raises(UserError, match="6145 bytes, not a multiple of 3073"):
        open_images(folder, split="test")
    (folder / "test_batch.bin").write_bytes(bytes(3073) + b"\x0a" + bytes(3072))
    source = open_images(folder, split="test")
    assert source[0].label == 0
    with pytest.raises(BadSample, match="outside the classes: 10; there are 10"):
        source[1]
    (folder / "batches.meta.txt").write_text("cat\n")
    with pytest.raises(UserError, match="does not name 10 classes"):
        open_images(folder, split="test")
    for content in ({"data": [1]}, {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]}):
        (tmp_path / "test").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="is it a file of CIFAR"):
            open_images(tmp_path, format="cifar")


# IDX.


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """Writes a folder of grey images and labels, the test split compressed."""

    def write(name="mnist"):
        folder = tmp_path / name
        folder.mkdir()
        for split, n in (("train", 5), ("t10k", 3)):
            pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
            for file, array in (
                (f"{split}-images-idx3-ubyte", pixels),
                (f"{split}-labels-idx1-ubyte", pixels[:, 0, 0]),
            ):
                array = array if array.ndim == 3 else array % 10
                content = idx(array)
                if split == "t10k":
                    (folder / f"{file}.gz").write_bytes(gzip.compress(content))
                else:
                    (folder / file).write_bytes(content)
        return folder

    return write


def test_idx(mnist):
    folder = mnist()
    for split, n in (("train", 5), ("test", 3)):
        source = open_images(folder, split=split)
        pixels = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        images, names = arrays(source)
        np.testing.assert_array_equal(images, np.repeat(pixels[..., None], 3, -1))
        assert names == [str(label) for label in pixels[:, 0, 0] % 10]
    with pytest.raises(UserError, match="set `split` to one of test, train"):
        open_images(folder)


def test_idx_plain_and_compressed_are_equal(mnist):
    folder = mnist()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not read where there is a plain one")
    plain = arrays(open_images(folder, split="train"))
    (folder / "train-images-idx3-ubyte.gz").unlink()
    for file in list(folder.glob("train-*")):
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    compressed = arrays(open_images(folder, split="train"))
    np.testing.assert_array_equal(plain[0], compressed[0])
    assert plain[1] == compressed[1]


def test_names_of_idx_classes(mnist):
    assert open_images(mnist(), split="test").classes == tuple("0123456789")
    fashion = mnist("fashion-mnist")
    assert open_images(fashion, split="test").classes[-1] == "Ankle boot"
    (fashion / "classes.txt").write_text("\n".join(TEN))
    assert open_images(fashion, split="test").classes == TEN


def test_what_is_wrong_with_idx(mnist):
    folder = mnist()
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for content, message in (
        (whole[:-1], "does not hold the 5 x 28 x 28 bytes"),
        (whole + b"\0", "does not hold"),
        (whole[:10], "not an IDX file"),
        (labels.read_bytes(), "not an IDX file"),
        (idx(np.zeros((4, 28, 28), np.uint8)), "4 images, but train-labels-idx1-ubyte 5 labels"),
        (whole[:4] + b"\xff" * 12, "train-images-idx3-ubyte"),
    ):
        images.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_images(folder, split="train")
    images.write_bytes(whole)
    labels.write_bytes(idx(np.array([1, 2, 3, 4, 200], np.uint8)))
    with pytest.raises(BadSample, match="outside the classes: 200"):
        open_images(folder, split="train")[4]
    labels.unlink()
    with pytest.raises(UserError, match="no labels beside it"):
        open_images(folder, split="train")
    test = folder / "t10k-images-idx3-ubyte.gz"
    for content in (test.read_bytes()[:-20], b"not gzip"):
        test.write_bytes(content)
        with pytest.raises(UserError, match="cannot read"):
            open_images(folder, split="test")


@pytest.mark.parametrize("key", [5, None, (b"data",), 10**5000, 1.5], ids=["5", "none", "tuple", "digits", "float"])
def test_a_pickle_whose_keys_are_no_texts_is_refused(tmp_path, key):
    (tmp_path / "train").write_bytes(pickle.dumps({b"data": b"", key: []}))
    with pytest.raises(UserError, match=r"train has keys that are not texts"):
        read_plain_pickle(tmp_path / "train")
