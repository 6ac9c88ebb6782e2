"""Lists of labelled images: two columns of our own, and the lists published with ImageNet's validation images."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .errors import UserError
from .labelled import PathImages, Texts, is_image_name, labels_of, read_classes

#: Tiny ImageNet's list, beside a folder ``images``.
ANNOTATIONS = "val_annotations.txt"

_KAGGLE = ["ImageId", "PredictionString"]
# Where the images of such lists are, from the list's folder.
_FOLDERS = ("", "images", "val", "ILSVRC/Data/CLS-LOC/val")
_BOX = 4


def open_list(path: Path, name: str) -> PathImages:
    """Open a text file with an image and its label on each line, separated by a tab, a comma or, without these, blanks.

    Paths start from the list's folder, or from ``images`` or ``val`` in it. A label is the number or the name of a
    class; a file ``classes.txt`` beside the list names the classes in order. A first line with neither the name of an
    image nor a number is a header. Blank lines are skipped. Other supported lists:

    - image, label and a box of four whole numbers, as in Tiny ImageNet's ``val_annotations.txt``;
    - ``ImageId,PredictionString``, as in Kaggle's ``LOC_val_solution.csv``;
    - numbers alone, as in the ImageNet devkit's ``ILSVRC2012_validation_ground_truth.txt``: the classes of the images
      beside the list, in the order of their names.

    Raises:
        UserError: the file is not UTF-8 or names no image, a line has more columns, or no file beside the list says in
            which order its classes are numbered.
    """
    lines = _lines(path)
    kaggle = bool(lines) and lines[0][1] == _KAGGLE
    if len(lines) == int(kaggle):
        raise UserError(f"{path} names no images; write `path label` on each line")
    if all(len(cells) == 1 and cells[0].isdecimal() for _, cells in lines):
        return _ground_truth(path, name, [cells[0] for _, cells in lines])
    if kaggle:
        pairs = [(number, *_kaggle(cells)) for number, cells in lines[1:]]
    else:
        pairs = [(number, *_pair(path, number, cells)) for number, cells in lines]
    labels = labels_of([label for _, _, label in pairs], read_classes(path.parent / "classes.txt"))
    images = [image for _, image, _ in pairs]
    numbers = np.array([number for number, _, _ in pairs], dtype=np.int64)
    return PathImages(name, _folder(path.parent, images[0]), Texts(images), labels, numbers)


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return the number and the cells of each line, without blank lines and a header of two columns."""
    try:
        texts = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    lines: list[tuple[int, list[str]]] = []
    delimiter = None
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        if not lines:
            delimiter = next((mark for mark in "\t," if mark in text), None)
        # Line by line, so that a quotation mark that is never closed cannot swallow the lines that follow.
        cells = next(csv.reader([text], delimiter=delimiter)) if delimiter else text.rsplit(None, 1)
        lines.append((number, [cell.strip() for cell in cells]))
    if lines and _is_header(lines[0][1]):
        del lines[0]
    return lines


def _is_header(cells: Sequence[str]) -> bool:
    names_an_image = any(map(is_image_name, cells))
    return len(cells) == 2 and list(cells) != _KAGGLE and not names_an_image and not cells[1].isdecimal()


def _pair(path: Path, number: int, cells: Sequence[str]) -> tuple[str, str | None]:
    """Return image and label, whichever of them comes first."""
    if len(cells) == 2 + _BOX and all(cell.isdecimal() for cell in cells[2:]):
        cells = cells[:2]
    if len(cells) > 2:
        raise UserError(f"{path}, line {number} has {len(cells)} columns; a list has two: image and label")
    if len(cells) == 1:
        return cells[0], None
    image, label = cells
    return (label, image) if is_image_name(label) and not is_image_name(image) else (image, label)


def _kaggle(cells: Sequence[str]) -> tuple[str, str | None]:
    """Return the image's file and the first label of "n03995372 85 1 499 272 …": all boxes have one class."""
    words = cells[1].split() if len(cells) > 1 else []
    return f"{cells[0]}.JPEG", words[0] if words else None


def _folder(folder: Path, image: str) -> Path:
    """Return the folder that the paths of a list start from."""
    return next((folder / inside for inside in _FOLDERS if (folder / inside / image).exists()), folder)


def _ground_truth(path: Path, name: str, numbers: Sequence[str]) -> PathImages:
    classes = _numbered_classes(path)
    labels = labels_of(numbers, classes, first=1)
    for inside in _FOLDERS:
        folder = path.parent / inside
        images = sorted(filter(is_image_name, os.listdir(folder))) if folder.is_dir() else []
        if images and len(images) != len(numbers):
            raise UserError(f"{path} has {len(numbers):,} labels, but {folder} {len(images):,} images; each needs one")
        if images:
            return PathImages(name, folder, Texts(images), labels)
    raise UserError(f"{path} has only labels, and no images are beside it; copy it into the folder of its images")


def _numbered_classes(path: Path) -> Sequence[str]:
    """Return the classes of a list of numbers, from number 1 on, as a file beside it names them."""
    if (classes := read_classes(path.parent / "classes.txt")) is not None:
        return classes
    if (path.parent / "map_clsloc.txt").is_file():  # of later devkits: "n02119789 1 kit_fox"
        return _mapped(path.parent / "map_clsloc.txt")
    if (path.parent / "meta.mat").is_file():
        return _meta(path.parent / "meta.mat")
    raise UserError(
        f"{path} numbers its classes from 1 in an order of its own. Put classes.txt beside it, with one class per "
        "line, number 1 first (for ImageNet the 1,000 synsets by ILSVRC2012_ID), or the devkit's meta.mat or "
        "map_clsloc.txt"
    )


def _mapped(path: Path) -> list[str]:
    lines = [line.split() for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    if not all(len(words) > 1 and words[1].isdecimal() for words in lines):
        raise UserError(f"{path} is not in the form of `n02119789 1 kit_fox`; write classes.txt instead")
    return [words[0] for words in sorted(lines, key=lambda words: int(words[1]))]


def _meta(path: Path) -> list[str]:
    """Return the 1,000 synsets of ImageNet's devkit that have no children, in the order of their ILSVRC2012_ID."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path} is read with scipy; pip install scipy, or write classes.txt") from None
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        leaves = [(int(one["ILSVRC2012_ID"]), str(one["WNID"])) for one in synsets if not int(one["num_children"])]
    except Exception as error:  # not a MATLAB file, or another one
        raise UserError(
            f"{path} is not the devkit's file ({type(error).__name__}); write classes.txt instead"
        ) from None
    return [synset for _, synset in sorted(leaves)]
