"""Set the image sizes of a Transformers processor: ``student.image`` and ``teacher.image`` of a configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from data.errors import UserError

from .common import check_keys
from .families import image_keys

#: Largest value of any key: a limit for numbers of pixels, far above every side length and number of tiles.
_LARGEST = 2**28


def with_image_settings(processor: Any, settings: Mapping[str, Any], where: str, largest: int | None = None) -> Any:
    """Return a copy of a Transformers processor whose image processor has these sizes.

    Args:
        processor: unchanged.
        settings: values by key; the keys are those of :func:`~.families.image_keys`.
        where: the section of the configuration, for errors.
        largest: the longest side in pixels that the vision encoder has positions for; ``None``: unknown.

    Raises:
        UserError: a key that this family's image processor does not read, or a value that it cannot take.
    """
    kind = type(processor.image_processor).__name__
    known = image_keys(kind)
    if not known:
        raise UserError(
            f"{where}: {kind} makes images of one size, the one that its vision encoder has positions for; leave it out"
        )
    check_keys(where, settings, known)
    for key, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise UserError(f"{where}.{key}: expected a whole number from 1 to {_LARGEST:,}, got {value!r}")
    changed = copy.copy(processor)
    changed.image_processor = copy.deepcopy(processor.image_processor)
    sizes = {}
    for key, value in settings.items():
        place = known[key]
        if place.startswith("size."):
            sizes[place.removeprefix("size.")] = value
        else:
            setattr(changed.image_processor, place, value)
    size = changed.image_processor.size
    changed.image_processor.size = type(size)(**{k: v for k, v in dict(size).items() if v is not None} | sizes)
    _check_sizes(changed, where, known, largest)
    return changed


def _check_sizes(processor: Any, where: str, known: Mapping[str, str], largest: int | None) -> None:
    """Raise ``UserError`` if sizes contradict each other, or do not fit the vision encoder or the vocabulary."""
    images = processor.image_processor
    for low, high in (("min_pixels", "max_pixels"), ("shortest_edge", "longest_edge"), ("min_patches", "max_patches")):
        if low in known and high in known:
            least, most = (_value(images, known[key]) for key in (low, high))
            if least > most:
                raise UserError(f"{where}: {low} is {least:,} and {high} {most:,}; set both, the first to no more")
    if "max_pixels" in known:
        patch = images.patch_size * images.merge_size
        if _value(images, known["max_pixels"]) < patch**2:
            raise UserError(f"{where}.max_pixels: an image takes {patch} × {patch} pixels; set {patch**2} or more")
    tile = getattr(images, "max_image_size", None)
    if tile is not None:
        # Tiles are named by tokens: <row_1_col_1> to the largest that the tokenizer has.
        side = tile["longest_edge"]
        rows = -(-images.size.longest_edge // side)
        if rows > 1 and f"<row_{rows}_col_{rows}>" not in processor.tokenizer.get_vocab():
            raise UserError(
                f"{where}.longest_edge: {images.size.longest_edge} makes {rows} rows of tiles of {side} pixels, more "
                "than the tokenizer has tokens for; choose less"
            )
    elif "longest_edge" in known and largest is not None and images.size.longest_edge > largest:
        raise UserError(
            f"{where}.longest_edge: {images.size.longest_edge} pixels, but the vision encoder has positions for "
            f"{largest}; choose at most that"
        )


def _value(images: Any, place: str) -> int:
    name = place.removeprefix("size.")
    return getattr(images.size if name != place else images, name)
