"""ImageNet's variants: which classes each has, in which order, and which answers count as right.

The only file that knows them by name. Classes, their order and ReaL's labels are timm's own files.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from timm.data import ImageNetInfo

from data.errors import BadSample, UserError

if TYPE_CHECKING:
    from data.classification import LabelledImage, LabelledImages

Set = Literal["val", "v2", "real", "a", "r", "val-a", "val-r", "sketch", "c"]

TITLES: Mapping[str, str] = {
    "val": "ImageNet",
    "v2": "ImageNet-V2",
    "real": "ImageNet ReaL",
    "a": "ImageNet-A",
    "r": "ImageNet-R",
    "val-a": "ImageNet, classes of A",
    "val-r": "ImageNet, classes of R",
    "sketch": "ImageNet-Sketch",
    "c": "ImageNet-C",
}

# Mean errors of AlexNet over the five severities (Hendrycks and Dietterich 2019, from the authors' published code).
_ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_SEVERITIES = range(1, 6)
# Sets whose classes may be given as numbers 0…999, in ImageNet's usual order.
_NUMBERED = ("v2", "val", "real", "val-a", "val-r")
# Most and fewest images to check the order with.
_COMPARED, _ENOUGH = 500, 20
_VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\b")


@dataclass(frozen=True)
class Variant:
    """A variant of ImageNet, and how it is scored.

    Attributes:
        source: images whose classes are synsets in ImageNet's order.
        only_mapped: only these classes compete, whatever else the classifier knows.
        references: all right labels of an image, or ``None`` where it is the image's one label.
    """

    source: LabelledImages
    only_mapped: bool = False
    references: Callable[[LabelledImage], Sequence[int]] | None = None


@cache
def synsets() -> tuple[str, ...]:
    """Return the 1,000 classes in the order of the classifiers' outputs."""
    return tuple(ImageNetInfo().label_names())


@cache
def indices(name: Literal["a", "r"]) -> tuple[int, ...]:
    """Return the indices of the 200 classes that ImageNet-A or -R has, rising."""
    return tuple(map(int, _info(f"imagenet_{name}_indices.txt").split()))


@cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """Return the right classes of each of the 50,000 validation images (Beyer et al. 2020); some have none."""
    return tuple(map(tuple, json.loads(_info("imagenet_real_labels.json"))))


def _info(name: str) -> str:
    return resources.files("timm.data").joinpath("_info", name).read_text("utf-8")


def readable(classes: Sequence[str]) -> tuple[str, ...]:
    """Return readable names: a word for an ImageNet-1k synset (with the synset if two share it); other names stay."""
    return tuple(_names().get(name, name) for name in classes)


@cache
def _names() -> dict[str, str]:
    words = {
        name: text.split(", ")[0] for name, text in zip(synsets(), ImageNetInfo().label_descriptions(), strict=True)
    }
    counts = Counter(words.values())
    return {name: word if counts[word] == 1 else f"{word} ({name})" for name, word in words.items()}


def open_variant(name: Set, source: LabelledImages) -> Variant:
    """Open a variant by its name.

    Args:
        name: ``val-a`` and ``val-r`` are the validation images of A's and R's classes, scored alike: the
            "clean" scores to compare A and R with.
        source: the variant's images. Classes are synsets, or for V2 and the validation images the numbers 0…999, in any
            order.

    Raises:
        UserError: the variant has no such class, or numbers are in another order; for ReaL, the source lacks classes.
    """
    subset: Literal["a", "r"] | None = {"a": "a", "val-a": "a", "r": "r", "val-r": "r"}.get(name)  # type: ignore[assignment]
    whole = synsets()
    classes = whole if subset is None else tuple(whole[i] for i in indices(subset))
    place = {synset: k for k, synset in enumerate(classes)}
    known = set(whole) if name.startswith("val-") else set(place)
    if name in _NUMBERED:
        place |= {str(k): place[synset] for k, synset in enumerate(whole) if synset in place}
        known |= {str(k) for k in range(len(whole))}
    labels = [place.get(given) for given in source.classes]
    for given in source.classes:
        if given not in known:
            raise UserError(f"{source.name}: class {given} is none of {TITLES[name]}; {_remedy(name, given)}")
    if name in _NUMBERED and all(given.isdecimal() for given in source.classes):
        _check_order(source)
    if name == "real" and len(set(labels)) < len(whole):
        raise UserError(f"{source.name}: ReaL needs all 1,000 classes of the validation set, found {len(labels)}")
    chosen = _Relabelled(source, TITLES[name], classes, labels, filtered=name.startswith("val-"))
    return Variant(chosen, subset is not None, _real if name == "real" else None)


def _remedy(name: Set, given: str) -> str:
    """Return what to do about a class that the variant does not have."""
    if given.isdecimal() and name != "v2":
        return (
            "put classes.txt beside the list: the synset of each of its numbers, such as n01440764, in their order and "
            "one a line"
        )
    return f"its folders are named by {'a number 0…999 or a synset' if name == 'v2' else 'a synset'}"


def _check_order(source: LabelledImages) -> None:
    """Raise ``UserError`` if ReaL's labels show that numbers are not in ImageNet's usual order."""
    agreed = []
    for row in range(0, len(source), max(1, len(source) // _COMPARED)):
        with suppress(BadSample):
            item = source[row]
            agreed.append(source.classes[item.label] in map(str, _real(item)))
    # In the right order about 85 % agree, in another one about one in a thousand.
    if len(agreed) >= _ENOUGH and sum(agreed) < len(agreed) / 2:
        raise UserError(
            f"{source.name}: its numbers are not ImageNet's classes in the usual order ({sum(agreed)} of {len(agreed)} "
            f"agree with ReaL's labels); {_remedy('val', '0')}"
        )


def _real(item: LabelledImage) -> Sequence[int]:
    """Raise ``BadSample`` if the name is not a validation file's, or the image has no right label."""
    found = _VALIDATION_FILE.search(item.image) if isinstance(item.image, str) else None
    if found is None or not 1 <= int(found[1]) <= len(real_labels()):
        raise BadSample("no name like ILSVRC2012_val_00000001.JPEG, by which ReaL knows an image")
    right = real_labels()[int(found[1]) - 1]
    if not right:
        raise BadSample("no right label")
    return right


class _Relabelled:
    """A source with another name and order of classes; images of other classes are left out."""

    def __init__(
        self,
        source: LabelledImages,
        name: str,
        classes: tuple[str, ...],
        labels: Sequence[int | None],
        *,
        filtered: bool,
    ) -> None:
        self.source, self.name, self.classes, self.labels = source, name, classes, labels
        self.rows: Sequence[int] = range(len(source))
        if filtered:
            self.rows = [row for row in self.rows if self._label(row) is not None]

    def _label(self, row: int) -> int | None:
        try:
            return self.labels[self.source[row].label]
        except BadSample:
            return None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> LabelledImage:
        item = self.source[self.rows[row]]
        label = self.labels[item.label]
        assert label is not None  # such classes are refused, or their rows are left out
        return replace(item, label=label)

    def line(self, row: int) -> int:
        return self.source.line(self.rows[row])

    def size(self, row: int) -> int:
        return 1


def outputs(wanted: Sequence[str], classes: Sequence[str] | None) -> list[int] | None:
    """Return the classifier's output for each wanted synset.

    Args:
        classes: the classifier's, in order. Without names, or with 1,000 names that are not synsets, the outputs are
            assumed to be ImageNet's in the usual order, as timm's are.

    Raises:
        UserError: the classifier lacks a synset.
    """
    usual = synsets()
    if classes is None or (len(classes) == len(usual) and not set(classes) & set(usual)):
        classes = usual
    place = {name: k for k, name in enumerate(classes)}
    for synset in wanted:
        if synset not in place:
            raise UserError(f"the classifier has no class {readable([synset])[0]}; it has {len(classes)} others")
    return [place[synset] for synset in wanted]


def corruption_folders(folder: Path) -> list[tuple[str, int, Path]]:
    """Return (corruption, severity, folder) for each ``<corruption>/<1…5>/<synset>/…``, or one level deeper if grouped.

    Raises:
        UserError: no such folder was found.
    """
    candidates = [*folder.glob("*/[1-5]"), *folder.glob("*/*/[1-5]")]
    found = sorted(path for path in candidates if path.is_dir())
    if not found:
        raise UserError(f"{folder}: no folders <corruption>/<severity 1 to 5>/<synset> there, as ImageNet-C has them")
    return [(path.parent.name, int(path.name), path) for path in found]


def corruption_scores(scores: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the scores of every corruption and severity of ImageNet-C.

    Returns:
        As of a classification: ``n``, and plain means over all corruptions and severities of ``exact``, ``top5``,
        ``nll`` and ``ece``; ``by_type``, the same of each corruption, as a mean over its severities; ``corruptions``,
        ``exact`` by corruption and severity. ``mce``: if all 15 corruptions were scored at all severities,
        100 · the mean over them of error / AlexNet's error (Hendrycks and Dietterich 2019), else ``None``.
    """
    scored = {key: found for key, found in scores.items() if found["n"]}
    by_corruption: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (corruption, severity), found in scored.items():
        by_corruption.setdefault(corruption, {})[severity] = found

    def mean(found: Sequence[Mapping[str, Any]], key: str) -> float | None:
        return math.fsum(f[key] for f in found) / len(found) if found else None

    def together(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"n": sum(f["n"] for f in found), "exact": mean(found, "exact")}

    everything = list(scored.values())
    complete = all(set(by_corruption.get(name, {})) == set(_SEVERITIES) for name in _ALEXNET)
    errors = []
    if complete:
        for name, usual in _ALEXNET.items():
            right = math.fsum(f["exact"] for f in by_corruption[name].values()) / len(_SEVERITIES)
            errors.append((1 - right) / usual)
    corruptions = {}
    for name, by_severity in by_corruption.items():
        corruptions[name] = {str(severity): f["exact"] for severity, f in sorted(by_severity.items())}
    return {
        "kind": "classification",
        **together(everything),
        **{key: mean(everything, key) for key in ("top5", "nll", "ece")},
        "by_type": {name: together(list(found.values())) for name, found in by_corruption.items()},
        "corruptions": corruptions,
        "mce": 100 * math.fsum(errors) / len(errors) if errors else None,
    }
