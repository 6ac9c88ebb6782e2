"""`LabelledImages`, the base class of readers for classification, and what they share: labels, names, paths."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .conversation import ImageSource
from .errors import BadSample, UserError
from .images import named_image

#: Names of image files, in lower case and without the dot.
IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2", "avif")
)

# A label that is a number needs no list of names. A number beyond this is a mistake, not a million more classes.
_MOST_CLASSES = 1_000_000

_NUMBER = re.compile(r"-?[0-9]{1,18}")
_SYNSET_AND_WORDS = re.compile(r"n[0-9]{8}\s")


@dataclass(frozen=True)
class LabelledImage:
    """One image, not decoded, and its class.

    Attributes:
        image: for :func:`data.images.load_image`.
        label: index into the classes of its source.
    """

    image: ImageSource
    label: int


class LabelledImages(Protocol):
    """Labelled images by index, ``images[0]`` to ``images[len(images) - 1]``.

    A source can be pickled and inherited by worker processes.

    Attributes:
        name: the name in reports.
        classes: names in the order of labels, as in the data: a folder's name, a synset, ``"0"`` to ``"9"``.
    """

    name: str
    classes: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> LabelledImage:
        """Return an image and its class.

        Raises:
            BadSample: it has no image, or no label among the classes.
            IndexError: there is no such index.
        """

    def line(self, index: int) -> int:
        """Return the 1-based position of an image in its source, for reports."""
        return index + 1

    def size(self, index: int) -> int:
        """Return 1: for grouping by length, all images are alike."""
        return 1


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of classes sorted as strings, or as numbers if all of them are numbers."""
    names = set(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


class Share(LabelledImages):
    """Some images of a source, evenly spaced, since class folders are read class by class.

    Args:
        whole: the source; the classes remain those of all its images.
        count: the most images.
    """

    def __init__(self, whole: LabelledImages, count: int) -> None:
        self.name = whole.name
        self.classes = whole.classes
        self._whole = whole
        self._count = min(count, len(whole))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> LabelledImage:
        return self._whole[self._index(index)]

    def line(self, index: int) -> int:
        return self._whole.line(self._index(index))

    def _index(self, index: int) -> int:
        """Return an image's index in the whole source."""
        return range(self._count)[index] * len(self._whole) // self._count


class Labels:
    """The class of each image.

    Args:
        numbers: int64 [images]; -1 for none.
        classes: names in the order of numbers.
        texts: the text found in place of a label, by index, for some of the images whose number is -1.
    """

    def __init__(
        self, numbers: NDArray[np.int64], classes: Sequence[str], texts: Mapping[int, str] | None = None
    ) -> None:
        self.numbers = numbers
        self.classes = tuple(classes)
        self._texts = texts or {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> int:
        """Return an image's class. Raise ``BadSample`` if it has no label among the classes."""
        number = int(self.numbers[index])
        if 0 <= number < len(self.classes):
            return number
        if number == -1 and index not in self._texts:
            raise BadSample("no label")
        label = self._texts.get(index, number)
        raise BadSample("label outside the classes", f"{label!s:.80}; there are {len(self.classes)} classes")


def labels_of(texts: Sequence[str | None], classes: Sequence[str] | None, *, first: int | None = None) -> Labels:
    """Return labels from texts that hold a class's name or its number; ``None`` and blank texts are missing labels.

    Args:
        texts: one for each image.
        classes: names in the order of numbers. Without them, if most of the different texts are numbers, the classes
            are ``"0"`` to the highest one and other texts are wrong; otherwise every text is a name.
        first: the number of the first class. By default 1 if the numbers run from 1 to the number of classes, else 0.
    """
    distinct = {text: text.strip() for text in set(texts) if text is not None and text.strip()}
    if classes is None:
        numbers = [int(text) for text in distinct.values() if _NUMBER.fullmatch(text)]
        highest = max((number for number in numbers if number < _MOST_CLASSES), default=-1)
        numeric = 2 * len(numbers) > len(distinct)
        classes = [str(number) for number in range(highest + 1)] if numeric else class_order(distinct.values())
    elif first is None:
        numbers = [int(text) for text in distinct.values() if _NUMBER.fullmatch(text)]
        first = int(bool(numbers) and min(numbers) >= 1 and max(numbers) == len(classes))
    first = first or 0
    by_name = {name: number for number, name in enumerate(classes)}
    known = {}
    for text, stripped in distinct.items():
        number = by_name.get(stripped)
        if number is None and _NUMBER.fullmatch(stripped) and 0 <= int(stripped) - first < len(classes):
            number = int(stripped) - first
        if number is not None:
            known[text] = number
    labels = np.fromiter((known.get(text, -1) if text else -1 for text in texts), np.int64, len(texts))
    wrong = {index: distinct[text] for index, text in enumerate(texts) if text in distinct and text not in known}
    return Labels(labels, classes, wrong)


def read_classes(path: Path) -> tuple[str, ...] | None:
    """Return names of classes from a file with one per line, such as ``classes.txt``; ``None`` if there is no file.

    If every line is a synset followed by words, as in Caffe's ``synset_words.txt``, the synset is the name.

    Raises:
        UserError: the file is not UTF-8, has no names, or has one twice.
    """
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if all(map(_SYNSET_AND_WORDS.match, names)):
        names = [name.split()[0] for name in names]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if not names or twice is not None:
        problem = "names no class" if not names else f"names the class {twice!r} twice"
        raise UserError(f"{path} {problem}; write one name per line, in the order of the labels")
    return tuple(names)


class Texts(Sequence[str]):
    """Many short texts in one block of memory, which worker processes share. As objects, they would be copied."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]  # file names may not be UTF-8
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class PathImages(LabelledImages):
    """Images in files of their own.

    Args:
        name: the name in reports.
        folder: the folder that relative paths start from.
        paths: one for each image.
        labels: one for each image.
        lines: int64 [images], the position of each image in reports; by default its index + 1.
    """

    def __init__(
        self, name: str, folder: Path, paths: Texts, labels: Labels, lines: NDArray[np.int64] | None = None
    ) -> None:
        self.name = name
        self.classes = labels.classes
        self._folder = folder
        self._paths = paths
        self._labels = labels
        self._lines = lines

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> LabelledImage:
        index = range(len(self))[index]
        path = self._paths[index]
        return LabelledImage(named_image(path, self._folder), self._labels[index])

    def line(self, index: int) -> int:
        return index + 1 if self._lines is None else int(self._lines[index])
