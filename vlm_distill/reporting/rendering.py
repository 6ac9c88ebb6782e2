"""The Jinja environment of the pages, and images embedded in them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from data.errors import BadSample
from data.images import load_image

from . import plots

_THUMBNAIL = 224
#: Images up to this size are enlarged with sharp pixels and stored without loss.
_TINY = 96


def environment() -> jinja2.Environment:
    """Return the environment that loads the templates and escapes every value."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm_distill.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        percent=plots.percent,
        points=plots.points,
        compact=plots.compact,
        duration=plots.duration,
        size=plots.size_in_bytes,
        swatch=lambda entry: plots.swatch(entry.css, entry.label),
        swatch_of_group=lambda group: plots.swatch(group.css, group.name),
        in_figures=plots.in_figures,
        thousands=lambda n: f"{n:,}",
        data_uri=thumbnail,
        number=lambda value: "–" if value is None else f"{value:,.1f}",
        decimals=lambda value: "–" if value is None else f"{value:.3f}",
    )
    return env


def thumbnail(path: str | Path | None) -> dict[str, Any] | None:
    """Return an image of at most 224 pixels a side as :func:`image_uri` does; ``None`` if it cannot be read."""
    if path is None or str(path).startswith("sha256:"):
        return None
    try:
        return image_uri(load_image(str(path)), _THUMBNAIL)
    except BadSample:
        return None


def image_uri(image: Image.Image, largest: int) -> dict[str, Any]:
    """Return an image as a ``data:`` address (``uri``), and whether to show it with sharp pixels (``tiny``).

    Shrinks ``image`` itself to ``largest`` pixels a side.
    """
    image = image.convert("RGB")
    tiny = max(image.size) <= _TINY
    image.thumbnail((largest, largest))
    buffer = io.BytesIO()
    if tiny:
        image.save(buffer, "png", optimize=True)
    else:
        image.save(buffer, "jpeg", quality=82)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": f"data:image/{'png' if tiny else 'jpeg'};base64,{content}", "tiny": tiny}
