"""Labelled images: class folders, lists, tars, Hugging Face data sets, CIFAR and IDX files as one kind of source."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .datasets_library import open_dataset
from .errors import BadSample, UserError
from .huggingface import without_media
from .image_arrays import is_cifar, is_idx, open_cifar, open_idx
from .image_lists import ANNOTATIONS, open_list
from .image_values import images_of
from .labelled import (
    IMAGE_SUFFIXES,
    LabelledImage,
    LabelledImages,
    Labels,
    PathImages,
    Share,
    Texts,
    class_order,
    is_image_name,
    labels_of,
    read_classes,
)
from .paths import SPLITS, check_regular, choose_split
from .tar_images import TarImages
from .tars import find_shards, is_shard_pattern

__all__ = ["FORMATS", "LabelledImage", "LabelledImages", "open_images"]

FORMATS = ("auto", "folder", "list", "tar", "huggingface", "cifar", "idx")

_SUFFIXES = {"txt": "list", "csv": "list", "tar": "tar", "parquet": "huggingface", "arrow": "huggingface"}


def open_images(
    path: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    config: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> LabelledImages:
    """A source of labelled images by its path, or its name on the Hugging Face hub.

    Args:
        path: a folder of class folders; a ``.txt`` or ``.csv`` list; a tar file, a folder of them, or a pattern with
            ``*`` or ``{000..099}``; a Hugging Face data set; a folder with the files of CIFAR, or with IDX files.
        format: one of :data:`FORMATS`; ``auto`` looks at what is there.
        split: which part, where there are several; ``val``, ``valid`` and ``validation`` mean the same.
        config: which configuration of a Hugging Face data set.
        name: what reports call the source; by default the name of the folder or file.
        limit: only so many rows, evenly spaced; the classes remain those of all.
        image_key: the column, or the field of a WebDataset sample, that holds the image.
        label_key: the column, field, or key in the field ``json``, that holds the label.

    Raises:
        UserError: nothing is there, it holds no labelled images, or its format or split is not clear.
    """
    given, path = str(path), Path(path)
    if limit is not None and limit < 1:
        raise UserError(f"limit of {given} is {limit}; it must be at least 1, or left out for all rows")
    try:
        source = _open(path, given, format, split, config, name, image_key, label_key)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or given}: {error.strerror or error}; check the path") from None
    return source if limit is None else Share(source, limit)


def _open(
    path: Path,
    given: str,
    format: str,
    split: str | None,
    config: str | None,
    name: str | None,
    image_key: str | None,
    label_key: str | None,
) -> LabelledImages:
    kind = _format(path, given, format)
    if config and kind != "huggingface":
        raise UserError(f"{given} is read as {kind} and has no config; leave it out")
    if (image_key or label_key) and kind not in ("huggingface", "tar"):
        raise UserError(f"{given} is read as {kind} and has no columns; leave image_key and label_key out")
    title = name or _title(path, given)
    if kind == "huggingface":
        dataset = open_dataset(path, given, split, config)
        base = path if path.is_dir() else path.parent if path.exists() else Path()
        return HuggingFaceImages(dataset, title, base, given, image_key, label_key)
    if kind == "tar":
        shards = find_shards(path, given, split)
        classes = read_classes(shards[0].parent / "classes.txt")
        return TarImages(shards, title, classes=classes, image_key=image_key, label_key=label_key)
    if kind == "list":
        if split:
            raise UserError(f"{given} is a list and has no splits; leave `split` out")
        return open_list(path, title)
    reader = {"folder": open_folder, "cifar": open_cifar, "idx": open_idx}[kind]
    return reader(path, title, split=split)


# What is there.


def _format(path: Path, given: str, format: str) -> str:
    """The reader for what the path names."""
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r} of images for {given}; known are {', '.join(FORMATS)}")
    suffix = path.suffix[1:].lower()
    if not path.exists() and not is_shard_pattern(given):
        hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", given) and suffix not in (*_SUFFIXES, *IMAGE_SUFFIXES)
        if format == "huggingface" or (format == "auto" and hub_name):
            return "huggingface"
        raise UserError(f"data {given} do not exist; check the path (relative ones start at {Path.cwd()})")
    if not path.is_dir():
        check_regular(path)
    if format != "auto":
        return format
    if path.is_dir():
        return _format_of_folder(path, given)
    if not path.exists():
        return "tar"
    if suffix not in _SUFFIXES:
        hint = "; unpack it: only plain .tar files can be read in any order" if ".tar." in path.name else ""
        raise UserError(f"cannot tell the format of {given} from its suffix{hint or f', known are {_known()}'}")
    return _SUFFIXES[suffix]


def _format_of_folder(folder: Path, given: str) -> str:
    kinds = _kinds(folder)
    if len(kinds) > 1:
        raise UserError(f"{given} may be read as {' or '.join(kinds)}; set `format` to one of them")
    if not kinds and any(is_image_name(entry.name) for entry in os.scandir(folder)):
        lists = sorted(
            entry.name for entry in os.scandir(folder) if _SUFFIXES.get(entry.name.rpartition(".")[2]) == "list"
        )
        remedy = (
            f"name the list, such as {folder / lists[0]}" if lists else "write a list of them with labels, and name it"
        )
        raise UserError(f"images of {given} are in no class folders; {remedy}")
    if not kinds:
        raise UserError(f"no images found in {given}; looked for {_known()}")
    return kinds[0]


def _known() -> str:
    return f".{', .'.join([*sorted(IMAGE_SUFFIXES), *_SUFFIXES])}, and the files of CIFAR and IDX"


def _kinds(folder: Path) -> list[str]:
    """The formats that a folder may be read in."""
    kinds = {name for name, is_there in (("cifar", is_cifar), ("idx", is_idx)) if is_there(folder)}
    for entry in os.scandir(folder):
        if entry.name in ("state.json", "dataset_dict.json"):
            kinds.add("huggingface")
        elif entry.name.startswith("."):
            continue
        elif entry.is_dir():
            # The first file that is known tells for the whole folder, which may hold a million.
            names = (_kind_of(name) for name in _files(entry.path, "", (os.path.realpath(entry.path),)))
            kind = next((kind for kind in names if kind), None)
            kinds |= {kind} if kind else set()
        elif _kind_of(entry.name) not in (None, "folder"):
            kinds.add(str(_kind_of(entry.name)))
    return sorted(kinds)


def _kind_of(name: str) -> str | None:
    """What a file in a folder speaks for. Lists do not: they are named themselves."""
    kind = _SUFFIXES.get(name.rpartition(".")[2].lower())
    return "folder" if is_image_name(name) else kind if kind != "list" else None


def _title(path: Path, given: str) -> str:
    if path.is_file():
        return path.stem
    if path.exists():
        return path.resolve().name
    if is_shard_pattern(given):
        return re.split(r"[*?\[{]", path.name)[0].rstrip("-_.") or path.parent.name
    return given


# Class folders.


def open_folder(folder: Path, name: str, *, split: str | None = None) -> PathImages:
    """``folder/class/…/image``, or ``folder/split/class/…/image``; classes by :func:`data.labelled.class_order`.

    Raises:
        UserError: there are no images, or the split is not clear.
    """
    inside = _folders(folder)
    splits = [one for one in inside if one in SPLITS or one == split]
    if split or len(splits) > 1 or (splits and splits == inside):
        if not splits:
            raise UserError(f"{folder} has no folder {split!r}; leave `split` out if its folders are the classes")
        folder = folder / choose_split(str(folder), split, splits)
    classes = class_order(_folders(folder))
    if classes == ("images",) and (folder / ANNOTATIONS).is_file():
        return open_list(folder / ANNOTATIONS, name)
    paths: list[str] = []
    numbers = np.zeros(len(classes), np.int64)
    for number, one in enumerate(classes):
        found = sorted(
            path
            for path in _files(os.path.join(folder, one), f"{one}/", (os.path.realpath(folder / one),))
            if is_image_name(path)
        )
        paths += found
        numbers[number] = len(found)
    if not paths:
        raise UserError(
            f"no images found in the folders of {folder}; looked for .{', .'.join(sorted(IMAGE_SUFFIXES))}"
            + ("" if classes else ": it has no folders")
        )
    labels = Labels(np.repeat(np.arange(len(classes)), numbers), classes)
    return PathImages(name, folder, Texts(paths), labels)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_dir())


def _files(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of files below a folder, hidden ones left out; from the listing alone, without a look at any file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # Of a link with the name of an image nobody asks where it leads: that would cost a look at the disk.
            if (is_image_name(entry.name) and not entry.is_dir(follow_symlinks=False)) or not entry.is_dir():
                yield prefix + entry.name
            else:
                real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
                if real in above:
                    raise UserError(f"{entry.path} is a link to a folder it is in; remove it")
                yield from _files(entry.path, f"{prefix}{entry.name}/", (*above, real))


# Hugging Face data sets.


class HuggingFaceImages(LabelledImages):
    """Rows of a ``datasets.Dataset`` with a column of images, which stay encoded, and a column of labels.

    Args:
        dataset: the data set; its own format and transforms are not used.
        name: what reports call the source.
        folder: what relative image paths start from.
        given: how the person named the data, for errors.
        image_key: the column of images; by default the only one of the type ``Image``.
        label_key: the column of labels (``ClassLabel``, numbers or names); by default the only ``ClassLabel``.

    Raises:
        UserError: there is no such column, or several.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        folder: Path,
        given: str,
        image_key: str | None = None,
        label_key: str | None = None,
    ) -> None:
        self.name = name
        self._folder = folder
        if not len(dataset):
            raise UserError(f"{given} has no rows; check the split")
        self._image = _column(dataset.features, given, image_key, "Image", "image_key")
        label = _column(dataset.features, given, label_key, "ClassLabel", "label_key")
        values = dataset.with_format("arrow").select_columns([label])[:][label].to_pylist()
        names = getattr(dataset.features[label], "names", None)
        if names is not None:
            self._labels = Labels(np.array([-1 if v is None else v for v in values], dtype=np.int64), names)
        elif all(value is None or isinstance(value, str | int) for value in values):
            self._labels = labels_of([None if value is None else str(value) for value in values], None)
        else:
            raise UserError(
                f"column {label!r} of {given} holds neither numbers nor names of classes; correct label_key"
            )
        self.classes = self._labels.classes
        images = dataset.select_columns([self._image])
        self._features = without_media(images.features)
        self._rows = images.with_format("arrow")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> LabelledImage:
        row = range(len(self))[row]
        label = self._labels[row]
        images = images_of(self._rows[row][self._image].to_pylist()[0], self._folder)
        if len(images) != 1:
            raise BadSample("sample without image" if not images else "several images", f"column {self._image!r}")
        return LabelledImage(images[0], label)


def _column(features: Any, given: str, key: str | None, kind: str, option: str) -> str:
    """The column of a kind, or the one that the person names."""
    if key is not None:
        if key not in features:
            raise UserError(f"{given} has no column {key!r}; set {option} to one of {', '.join(features)}")
        return key
    found: Sequence[str] = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        problem = f"{len(found)} columns of the type {kind}" if found else f"no column of the type {kind}"
        raise UserError(f"{given} has {problem}; set {option} to one of {', '.join(found or features)}")
    return found[0]
