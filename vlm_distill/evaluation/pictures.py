"""Write small copies of pictures that exist only inside the data, for reports that show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from data.conversation import ImageSource
from data.errors import BadSample

from .predictions import Prediction
from .question_source import evenly_spaced

#: The most pictures that are kept, at some 10 kB each.
_MOST = 200
_LARGEST = 224
# Pictures up to this size are kept losslessly: every pixel counts.
_TINY = 96
_HASHED = "sha256:"


def write_pictures(
    folder: Path,
    predictions: Sequence[Prediction],
    picture: Callable[[int], ImageSource],
    load: Callable[[ImageSource], Image.Image],
) -> None:
    """Write the pictures of up to 200 evenly spaced questions whose data hold bytes, named by their hashes.

    The choice is the same for every model that was asked the same questions. Existing files are left as they are.

    Args:
        picture: returns the picture of a row of the source; may raise ``BadSample``.
        load: decodes it.
    """
    for position in evenly_spaced(len(predictions), _MOST):
        asked = predictions[position]
        if asked.image is None or not asked.image.startswith(_HASHED) or find_picture(asked.image, [folder]):
            continue
        with suppress(BadSample):
            image = load(picture(asked.index)).convert("RGB")
            tiny = max(image.size) <= _TINY
            image.thumbnail((_LARGEST, _LARGEST))
            folder.mkdir(parents=True, exist_ok=True)
            name = asked.image.removeprefix(_HASHED)
            image.save(folder / (f"{name}.png" if tiny else f"{name}.jpg"), quality=90)


def find_picture(image: str | None, folders: Sequence[Path]) -> Path | None:
    """Return the file of a prediction's ``image``: its own, or a copy in one of the folders."""
    if image is None:
        return None
    if not image.startswith(_HASHED):
        return Path(image)
    name = image.removeprefix(_HASHED)
    candidates = (folder / f"{name}{suffix}" for folder in folders for suffix in (".png", ".jpg"))
    return next((path for path in candidates if path.is_file()), None)
