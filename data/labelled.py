"""What a reader of labelled images gives, and what readers share: labels as numbers, many texts in one block."""

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

# A label that is a number needs no list of names. Beyond this it is a mistake, and not a million classes more.
_MOST_CLASSES = 1_000_000

_NUMBER = re.compile(r"-?[0-9]{1,18}")
_SYNSET_AND_WORDS = re.compile(r"n[0-9]{8}\s")


@dataclass(frozen=True)
class LabelledImage:
    """One image, not decoded, and its class.

    Attributes:
        image: what :func:`data.images.load_image` takes.
        label: index into the classes of its source.
    """

    image: ImageSource
    label: int


class LabelledImages(Protocol):
    """Labelled images by index, ``images[0]`` to ``images[len(images) - 1]``.

    A source can be pickled and inherited by worker processes.

    Attributes:
        name: what reports call it.
        classes: names in the order of labels, as the data name them: a folder's name, a synset, ``"0"`` to ``"9"``.
    """

    name: str
    classes: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> LabelledImage:
        """The image of a row.

        Raises:
            BadSample: it has no image, or no label of the classes.
            IndexError: there is no such row.
        """

    def line(self, row: int) -> int:
        """The 1-based place of a row in its source, for reports."""
        return row + 1

    def size(self, row: int) -> int:
        """Length of a row for grouping by length: images are all alike."""
        return 1


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in plain order of strings, or, where all of them are numbers, of numbers."""
    names = set(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


class Share(LabelledImages):
    """So many rows of a source, evenly spaced, since class folders stand class by class.

    Args:
        whole: the source; the classes remain those of all its rows.
        rows: how many, at most.
    """

    def __init__(self, whole: LabelledImages, rows: int) -> None:
        self.name = whole.name
        self.classes = whole.classes
        self._whole = whole
        self._count = min(rows, len(whole))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> LabelledImage:
        return self._whole[self._place(row)]

    def line(self, row: int) -> int:
        return self._whole.line(self._place(row))

    def _place(self, row: int) -> int:
        return range(self._count)[row] * len(self._whole) // self._count


class Labels:
    """The class of each row.

    Args:
        numbers: int64 [rows]; -1 stands for none.
        classes: names in the order of numbers.
        texts: what stands in place of a label in rows whose number is -1, where something does.
    """

    def __init__(
        self, numbers: NDArray[np.int64], classes: Sequence[str], texts: Mapping[int, str] | None = None
    ) -> None:
        self.numbers = numbers
        self.classes = tuple(classes)
        self._texts = texts or {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> int:
        """Raises ``BadSample`` where the row has no label or none of the classes."""
        number = int(self.numbers[row])
        if 0 <= number < len(self.classes):
            return number
        if number == -1 and row not in self._texts:
            raise BadSample("no label")
        raise BadSample(
            "label outside the classes", f"{self._texts.get(row, number)!s:.80}; there are {len(self.classes)} classes"
        )


def labels_of(texts: Sequence[str | None], classes: Sequence[str] | None, *, first: int | None = None) -> Labels:
    """Return labels from texts that hold a class's name or its number; ``None`` and blank ones are missing.

    Args:
        texts: one for each row.
        first: the number of the first class. By default 1 where the numbers go from 1 to as many as there are classes,
            else 0.
        classes: names in the order of numbers. Without them numbers make classes ``"0"`` up to the highest one. Where
            half of the different texts are no numbers, all are names, else those few are wrong.
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
    places = {name: number for number, name in enumerate(classes)}
    known = {}
    for text, stripped in distinct.items():
        number = places.get(stripped)
        if number is None and _NUMBER.fullmatch(stripped) and 0 <= int(stripped) - first < len(classes):
            number = int(stripped) - first
        if number is not None:
            known[text] = number
    numbers_of_rows = np.fromiter((known.get(text, -1) if text else -1 for text in texts), np.int64, len(texts))
    wrong = {row: distinct[text] for row, text in enumerate(texts) if text in distinct and text not in known}
    return Labels(numbers_of_rows, classes, wrong)


def read_classes(path: Path) -> tuple[str, ...] | None:
    """Return names of classes from a file with one a line, such as ``classes.txt``; ``None`` if there is no such file.

    Where every line is a synset and words for it, as in Caffe's ``synset_words.txt``, the synset is the name.

    Raises:
        UserError: it is not UTF-8, has no names, or has one twice.
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
        raise UserError(f"{path} {problem}; write one name a line, in the order of the labels")
    return tuple(names)


class Texts(Sequence[str]):
    """Many short texts in one block of memory, which worker processes share; as objects each would be copied."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [os.fsencode(text) for text in texts]  # names of files need not be UTF-8
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])


class PathImages(LabelledImages):
    """Images that are files of their own.

    Args:
        name: what reports call the source.
        folder: what relative paths start from.
        paths: one for each row.
        labels: one for each row.
        lines: int64 [rows], the place of each row for reports; by default its number.
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

    def __getitem__(self, row: int) -> LabelledImage:
        row = range(len(self))[row]
        path = self._paths[row]
        return LabelledImage(named_image(path, self._folder), self._labels[row])

    def line(self, row: int) -> int:
        return row + 1 if self._lines is None else int(self._lines[row])
