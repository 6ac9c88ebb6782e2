"""Data sets stored as one array of pixels: CIFAR-10, CIFAR-100, and IDX files (MNIST, Fashion-MNIST)."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import UserError
from .labelled import LabelledImage, LabelledImages, Labels, read_classes
from .paths import choose_split
from .plain_pickle import read_plain_pickle

#: The class names of Fashion-MNIST, as its README lists them.
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class ArrayImages(LabelledImages):
    """Images in memory, returned as Pillow images.

    Args:
        name: the name in reports.
        pixels: uint8 [images, height, width] (grey) or [images, height, width, 3].
        labels: one for each image.
    """

    def __init__(self, name: str, pixels: NDArray[np.uint8], labels: Labels) -> None:
        self.name = name
        self.classes = labels.classes
        self._pixels = pixels
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> LabelledImage:
        index = range(len(self))[index]
        return LabelledImage(Image.fromarray(self._pixels[index]), self._labels[index])


# CIFAR.

_SIDE = 32
_TEN = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
_HUNDRED = {"train": ("train",), "test": ("test",)}


def is_cifar(folder: Path) -> bool:
    return _layout(folder) is not None


def _layout(folder: Path) -> tuple[Mapping[str, Sequence[str]], str] | None:
    """Return the files of each split, and their suffix."""
    for files, witnesses in ((_TEN, ("data_batch_1", "test_batch")), (_HUNDRED, ("train", "test"))):
        for suffix in (".bin", ""):
            if any((folder / f"{witness}{suffix}").is_file() for witness in witnesses):
                return files, suffix
    return None


def open_cifar(folder: Path, name: str, *, split: str | None = None) -> ArrayImages:
    """Open CIFAR-10 or CIFAR-100 (fine labels), from the binary files or the Python pickles, whose code is not run.

    Raises:
        UserError: a file is missing, has the wrong size, or is not a file of CIFAR.
    """
    layout = _layout(folder)
    if layout is None:
        raise UserError(f"{folder} holds no files of CIFAR (data_batch_1.bin, data_batch_1, train.bin or train)")
    files, suffix = layout
    splits = []
    for one, names in files.items():
        if any((folder / f"{name}{suffix}").exists() for name in names):
            splits.append(one)
    parts = []
    for file in files[choose_split(str(folder), split, splits)]:
        path = folder / f"{file}{suffix}"
        if not path.is_file():
            raise UserError(f"{path} is missing; fetch the data set again")
        parts.append(_binary(path, files is _HUNDRED) if suffix else _pickled(path, files is _HUNDRED))
    # Each image is all its red values, then green, then blue.
    flat = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, _SIDE, _SIDE)
    labels = Labels(np.concatenate([numbers for _, numbers in parts]), _cifar_classes(folder, files is _HUNDRED))
    return ArrayImages(name, np.ascontiguousarray(flat.transpose(0, 2, 3, 1)), labels)


def _binary(path: Path, fine: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    head = 2 if fine else 1  # CIFAR-100: coarse label, then fine label
    record = head + 3 * _SIDE**2
    size = path.stat().st_size
    if not size or size % record:
        raise UserError(f"{path} has {size} bytes, not a multiple of {record}; it is truncated: fetch it again")
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    return records[:, head:], records[:, head - 1].astype(np.int64)


def _pickled(path: Path, fine: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = read_plain_pickle(path)
    key = "fine_labels" if fine else "labels"
    pixels, labels = content.get("data"), content.get(key)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:] != (3 * _SIDE**2,):
        raise UserError(f"{path} has no array of {3 * _SIDE**2} values per row under 'data'; is it a file of CIFAR?")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(one) is int for one in labels):
        raise UserError(f"{path} has no list of {len(pixels)} numbers under {key!r}; is it a file of CIFAR?")
    within = [label if 0 <= label < 2**31 else -1 for label in labels]
    return pixels, np.array(within, dtype=np.int64)


def _cifar_classes(folder: Path, fine: bool) -> tuple[str, ...]:
    """Return the names in the file that accompanies the data, or numbers."""
    count, meta, key, text = 10, "batches.meta", "label_names", folder / "batches.meta.txt"
    if fine:
        count, meta, key, text = 100, "meta", "fine_label_names", folder / "fine_label_names.txt"
    names: Any = read_classes(text)
    if names is None and (folder / meta).is_file():
        names = read_plain_pickle(folder / meta).get(key)
    if names is None:
        return tuple(map(str, range(count)))
    if not isinstance(names, list | tuple) or len(names) != count:
        raise UserError(f"{folder} does not name {count} classes in {text.name} or {meta}; fetch the file again")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names)


# IDX.

_IMAGES = re.compile(r"(.+)-images[-.]idx3-ubyte(\.gz)?")


def is_idx(folder: Path) -> bool:
    return bool(_idx_splits(folder))


def _idx_splits(folder: Path) -> dict[str, Path]:
    """Return the image file of each split, preferring an uncompressed one."""
    splits = {}
    for path in sorted(folder.iterdir(), reverse=True):
        if match := _IMAGES.fullmatch(path.name):
            splits["test" if match[1] == "t10k" else match[1]] = path
    return dict(sorted(splits.items()))


def open_idx(folder: Path, name: str, *, split: str | None = None) -> ArrayImages:
    """Open a folder of ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-…``, plain or with ``.gz``.

    Classes are named by a file ``classes.txt`` beside them, or by Fashion-MNIST's own names if the folder's or its
    parent's name contains ``fashion``, or else ``"0"`` to ``"9"``.

    Raises:
        UserError: a file is missing, broken, or has another size than its header says.
    """
    splits = _idx_splits(folder)
    if not splits:
        raise UserError(f"{folder} holds no IDX images (train-images-idx3-ubyte or .gz)")
    images = splits[choose_split(str(folder), split, list(splits))]
    plain = images.name.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    labels = next((folder / f"{plain}{end}" for end in ("", ".gz") if (folder / f"{plain}{end}").is_file()), None)
    if labels is None:
        raise UserError(f"{images} has no labels beside it; fetch {plain} or {plain}.gz")
    pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise UserError(f"{images} has {len(pixels)} images, but {labels.name} {len(numbers)} labels; fetch both again")
    where = "/".join(folder.resolve().parts[-2:]).lower()
    classes = read_classes(folder / "classes.txt") or (FASHION if "fashion" in where else tuple("0123456789"))
    return ArrayImages(name, pixels, Labels(numbers.astype(np.int64), classes))


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
                raise UserError(f"{path} is not an IDX file of bytes in {dimensions} dimensions; fetch it again")
            shape = [int(length) for length in np.frombuffer(head, ">u4", offset=4)]
            data = file.read(math.prod(shape) + 1)  # one more, to check that nothing follows
    except (OSError, EOFError, zlib.error, OverflowError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {error or 'its header asks for too much'}; fetch it again") from None
    if len(data) != math.prod(shape) or not data:
        size = " x ".join(map(str, shape))
        raise UserError(f"{path} does not hold the {size} bytes that its header gives; it is truncated: fetch it again")
    return np.frombuffer(data, np.uint8).reshape(shape)
