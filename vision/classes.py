"""Bring the classes of data, student and teacher into one order, by class name or synset."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo
from torch import Tensor

from data.errors import UserError

SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassMap:
    """How three class sets fit together.

    Attributes:
        labels: int64 ``[data's classes]``, the student's output for each label of the data; ``None``: they are equal.
        teacher_index: int64 ``[student's outputs]``, the teacher's output for each output of the student, so that
            ``teacher_logits[:, teacher_index]`` are in the student's order; ``None``: they are in it already.
        notes: assumptions to report to the user.
    """

    labels: Tensor | None
    teacher_index: Tensor | None
    notes: tuple[str, ...] = ()


def map_classes(
    student: Sequence[str] | None,
    teacher: Sequence[str] | None,
    data: Sequence[str],
    *,
    student_outputs: int,
    teacher_outputs: int | None = None,
) -> ClassMap:
    """Find every class of the data among the student's, and every class of the student among the teacher's.

    Names are compared without regard to case, and underscores count as spaces. Where names differ, ImageNet's synsets
    are compared: a synset, timm's description, one of its terms and open_clip's name are the same class. A set may
    have more classes than needed. Numbers counted from 0 are not taken as names.

    Args:
        student, teacher: class names in the order of the outputs; ``None`` if unknown: then numbers
            of classes must agree.
        data: class names in the order of the labels.
        student_outputs, teacher_outputs: numbers of outputs; ``None`` without a teacher.

    Raises:
        UserError: a class is missing, or names are unknown and numbers differ.
    """
    notes = []
    student, teacher, named = _names(student), _names(teacher), _names(data)
    if student is None or named is None:
        _same_number("data", len(data), "the student", student_outputs)
        if student is not named:
            notes.append("data and student: classes taken to be in the same order, as one of them has no names")
        labels = None
        student = student or named
    else:
        labels = _index(named, student, "the data's classes", "the student")
    if teacher_outputs is None:
        return ClassMap(labels, None, tuple(notes))
    if student is None or teacher is None:
        _same_number("the student", student_outputs, "the teacher", teacher_outputs)
        notes.append("student and teacher: classes taken to be in the same order, as one of them has no names")
        return ClassMap(labels, None, tuple(notes))
    return ClassMap(labels, _index(student, teacher, "the student's classes", "the teacher"), tuple(notes))


def _names(classes: Sequence[str] | None) -> tuple[str, ...] | None:
    if classes is None or all(name == str(i) for i, name in enumerate(classes)):
        return None
    # Match all of ImageNet by order: open_clip calls two classes missile, and timm two crane.
    info = ImageNetInfo("imagenet-1k")
    for naming in (IMAGENET_CLASSNAMES, _descriptions(info).values()):
        if [plain(n) for n in classes] == [plain(n) for n in naming]:
            return tuple(info.label_names())
    return tuple(classes)


def _same_number(first: str, count: int, second: str, outputs: int) -> None:
    if count != outputs:
        raise UserError(
            f"classes: {first} has {count}, {second} {outputs}, and one of them has no names to map by; give "
            "'classes', or for a list of numbers classes.txt beside it"
        )


def _index(wanted: Sequence[str], among: Sequence[str], whose: str, where: str) -> Tensor | None:
    """Return the index in ``among`` of each name in ``wanted``; ``None`` if both list the same names in order."""
    if [plain(n) for n in wanted] == [plain(n) for n in among]:
        return None  # including duplicate names
    places: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(among):
        places[plain(name)].append(place)
    synsets: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(among):
        synsets[synset(name) or ""].append(place)
    occurrences = Counter(plain(name) for name in wanted)
    twice = {name for name, times in occurrences.items() if times > 1}
    if twice:
        raise UserError(f"classes: {whose} have '{min(twice)}' more than once, so names cannot tell them apart")
    found, missing = [], []
    for name in wanted:
        direct = places.get(plain(name)) or synsets.get(synset(name) or "-", [])
        if len(direct) == 1:
            found.append(direct[0])
        else:
            missing.append(name if not direct else f"{name} (occurs {len(direct)} times)")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"classes: {where} lacks {len(missing)} of {whose}: {', '.join(missing[:5])}{more}; "
            "give 'classes' with names that agree, or other data"
        )
    return None if found == list(range(len(among))) else torch.tensor(found)


def plain(name: str) -> str:
    """Return a name as it is compared."""
    return " ".join(name.replace("_", " ").casefold().split())


def synset(name: str) -> str | None:
    """Return the synset that a name means among ImageNet's 1,000 classes; ``None`` if there is none or several."""
    if SYNSET.fullmatch(name):
        return name
    return _by_name().get(plain(name))


@functools.cache
def _by_name() -> Mapping[str, str]:
    info = ImageNetInfo("imagenet-1k")
    # From the most exact naming to the loosest; a name that is ambiguous in one of them is not used.
    known: dict[str, str | None] = {}
    for naming in (_descriptions(info), dict(zip(info.label_names(), IMAGENET_CLASSNAMES, strict=True)), _terms(info)):
        new: dict[str, str | None] = {}
        for wnid, names in naming.items():
            for name in [names] if isinstance(names, str) else names:
                new[plain(name)] = wnid if new.get(plain(name), wnid) == wnid else None
        known = new | known
    return {name: wnid for name, wnid in known.items() if wnid is not None}


def _descriptions(info: ImageNetInfo) -> dict[str, str]:
    return {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}


def _terms(info: ImageNetInfo) -> dict[str, list[str]]:
    return {wnid: text.split(",") for wnid, text in _descriptions(info).items()}


@functools.cache
def words() -> Mapping[str, str]:
    """Return a word for each ImageNet synset: open_clip's for the 1,000 classes, else its description's first term."""
    everything = ImageNetInfo("imagenet-22k")
    first = {wnid: text.split(",")[0] for wnid, text in _descriptions(everything).items()}
    return first | dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))
