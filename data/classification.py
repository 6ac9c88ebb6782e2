"""Open labelled images: class folders, lists, tars, Hugging Face data sets, CIFAR and IDX files."""

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
from .paths import SPLITS, check_regular, choose_split, folder_of
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
    """Open a source of labelled images by its path or its name on the Hugging Face hub.

    Args:
        path: a folder of class folders; a ``.txt`` or ``.csv`` list; a tar file, a folder of them, or a pattern with
            ``*`` or ``{000..099}``; a Hugging Face data set; a folder with the files of CIFAR, or with IDX files.
        format: one of :data:`FORMATS`; ``auto`` looks at the files.
        split: the split, if there are several; ``val``, ``valid`` and ``validation`` mean the same.
        config: the configuration of a Hugging Face data set.
        name: the name in reports; by default that of the folder or file.
        limit: use only ``limit`` images, evenly spaced; the classes remain those of all.
        image_key: the column, or the field of a WebDataset sample, that holds the image.
        label_key: the column, field, or key in the field ``json``, that holds the label.

    Raises:
        UserError: the path does not exist, holds no labelled images, or its format or split is ambiguous.
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
        return HuggingFaceImages(dataset, title, folder_of(path), given, image_key, label_key)
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


# Formats.


def _format(path: Path, given: str, format: str) -> str:
    """Return which reader the path needs."""
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
        names = sorted(entry.name for entry in os.scandir(folder))
        lists = [name for name in names if _SUFFIXES.get(name.rpartition(".")[2]) == "list"]
        remedy = "write a list of them with labels, and name it"
        if lists:
            remedy = f"name the list, such as {folder / lists[0]}"
        raise UserError(f"images of {given} are in no class folders; {remedy}")
    if not kinds:
        raise UserError(f"no images found in {given}; looked for {_known()}")
    return kinds[0]


def _known() -> str:
    return f".{', .'.join([*sorted(IMAGE_SUFFIXES), *_SUFFIXES])}, and the files of CIFAR and IDX"


def _kinds(folder: Path) -> list[str]:
    """Return the formats in which a folder could be read."""
    kinds = {name for name, is_there in (("cifar", is_cifar), ("idx", is_idx)) if is_there(folder)}
    for entry in os.scandir(folder):
        if entry.name in ("state.json", "dataset_dict.json"):
            kinds.add("huggingface")
        elif entry.name.startswith("."):
            continue
        elif entry.is_dir():
            # The first file of a known kind decides for the whole folder, which may hold a million.
            names = (_kind_of(name) for name in _files(entry.path, "", (os.path.realpath(entry.path),)))
            kind = next((kind for kind in names if kind), None)
            kinds |= {kind} if kind else set()
        elif _kind_of(entry.name) not in (None, "folder"):
            kinds.add(str(_kind_of(entry.name)))
    return sorted(kinds)


def _kind_of(name: str) -> str | None:
    """Return the format that a file suggests for its folder. Lists suggest none: they are named directly."""
    if is_image_name(name):
        return "folder"
    kind = _SUFFIXES.get(name.rpartition(".")[2].lower())
    return None if kind == "list" else kind


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
    """Open ``folder/class/…/image`` or ``folder/split/class/…/image``; see :func:`data.labelled.class_order`.

    Raises:
        UserError: there are no images, or the split is ambiguous.
    """
    folders = _folders(folder)
    splits = [one for one in folders if one in SPLITS or one == split]
    if split or len(splits) > 1 or (splits and splits == folders):
        if not splits:
            raise UserError(f"{folder} has no folder {split!r}; leave `split` out if its folders are the classes")
        folder = folder / choose_split(str(folder), split, splits)
    classes = class_order(_folders(folder))
    if classes == ("images",) and (folder / ANNOTATIONS).is_file():
        return open_list(folder / ANNOTATIONS, name)
    paths: list[str] = []
    numbers = np.zeros(len(classes), np.int64)
    for number, one in enumerate(classes):
        inside = _files(os.path.join(folder, one), f"{one}/", (os.path.realpath(folder / one),))
        found = sorted(filter(is_image_name, inside))
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
    """Yield the paths of files below a folder, without hidden ones, from directory listings alone."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A link named like an image is not followed: that would cost an access to the disk.
            if (is_image_name(entry.name) and not entry.is_dir(follow_symlinks=False)) or not entry.is_dir():
                yield prefix + entry.name
            else:
                real = os.path.realpath(entry.path) if entry.is_symlink() else f"{above[-1]}/{entry.name}"
                if real in above:
                    raise UserError(f"{entry.path} is a link to a folder it is in; remove it")
                yield from _files(entry.path, f"{prefix}{entry.name}/", (*above, real))


# Hugging Face data sets.


class HuggingFaceImages(LabelledImages):
    """A ``datasets.Dataset`` with a column of images, which stay encoded, and a column of labels.

    Args:
        dataset: the data set; its own format and transforms are ignored.
        name: the name in reports.
        folder: the folder that relative image paths start from.
        given: the path or name as the user wrote it, for errors.
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
            numbers = [-1 if value is None else value for value in values]
            self._labels = Labels(np.array(numbers, dtype=np.int64), names)
        elif all(value is None or isinstance(value, str | int) for value in values):
            self._labels = labels_of([None if value is None else str(value) for value in values], None)
        else:
            raise UserError(
                f"column {label!r} of {given} holds neither numbers nor names of classes; correct label_key"
            )
        self.classes = self._labels.classes
        images = dataset.select_columns([self._image])
        self._features = without_media(images.features)
        self._table = images.with_format("arrow")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> LabelledImage:
        index = range(len(self))[index]
        label = self._labels[index]
        images = images_of(self._table[index][self._image].to_pylist()[0], self._folder)
        if len(images) != 1:
            raise BadSample("sample without image" if not images else "several images", f"column {self._image!r}")
        return LabelledImage(images[0], label)


def _column(features: Any, given: str, key: str | None, kind: str, option: str) -> str:
    """Return the only column of a kind, or the one that the user names."""
    if key is not None:
        if key not in features:
            raise UserError(f"{given} has no column {key!r}; set {option} to one of {', '.join(features)}")
        return key
    found: Sequence[str] = [column for column, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        problem = f"{len(found)} columns of the type {kind}" if found else f"no column of the type {kind}"
        raise UserError(f"{given} has {problem}; set {option} to one of {', '.join(found or features)}")
    return found[0]
