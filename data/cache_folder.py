"""A cache's folder: made whole or not at all, and compared by name with what a run is about to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from .errors import UserError

ABOUT = "cache.json"


def make_folder(folder: Path, what: str, about: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
    """Makes the folder under another name first: of several processes one gives it its place.

    Args:
        folder: what stands there already, if it is a cache, is left alone.
        what: is cached, for messages.
        about: goes into ``cache.json``.
        fill: writes everything else.

    Raises:
        UserError: there is something else, or nothing may be written.
    """
    made = folder.with_name(f"{folder.name}.{uuid4().hex}")
    try:
        made.mkdir(parents=True)
        try:
            fill(made)
            (made / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            made.rename(folder)
        except OSError:
            # Another process was first, or there is a folder with something else in it.
            if not (folder / ABOUT).exists():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot make the cache of {what}: {error.strerror}; name an empty folder that may be written"
        ) from None


def read_about(folder: Path) -> dict[str, Any]:
    """What ``cache.json`` says. Raises ``UserError`` where it cannot be read."""
    path = folder / ABOUT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; delete the folder to fill it anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; delete the folder to fill it anew")
    return found


def compare(folder: Path, what: str, found: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Raises ``UserError`` where a cache is of something else than ``identity`` says."""
    for key in [*identity, *(key for key in found if key not in identity)]:
        old, new = found.get(key, "none"), identity.get(key, "none")
        if old != new:
            raise UserError(
                f"{folder}: its {what} are of another {key}: {old} there, {new} here; name another folder, or "
                "delete this one to fill it anew"
            )


def check_room(folder: Path, what: str, needed: float, remedy: str) -> None:
    """Raises ``UserError`` where fewer than ``needed`` bytes are free."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room, choose another "
            f"folder, or {remedy}"
        )
