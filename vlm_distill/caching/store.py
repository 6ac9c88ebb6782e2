"""A cache's folder: created atomically, filled by one command at a time, and compared with what a run needs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from torch import Tensor

from data.errors import UserError
from data.saved_json import read_object
from vlm_distill.runtime import manifest
from vlm_distill.runtime.lock import Taken, hold, holder

#: The file that says what a cache holds.
ABOUT = "cache.json"


def make_folder(
    folder: Path,
    what: str,
    about: Mapping[str, Any],
    fill: Callable[[Path], None],
    changing: Container[str] = (),
) -> None:
    """Create a cache's folder atomically: under another name first, then renamed by whichever process is first.

    Args:
        folder: the cache; if there is one already, it is left alone.
        what: the content, for messages.
        about: the content of ``cache.json``, to which its own checksum and those of the other files are added.
        fill: writes all other files into the folder.
        changing: files without a checksum, because they change while the cache fills.

    Raises:
        UserError: there is another folder of that name, or it cannot be written.
    """
    made = folder.with_name(f"{folder.name}.{uuid4().hex}")
    try:
        made.mkdir(parents=True)
        try:
            fill(made)
            entries = manifest.entries_of(made, left_out=changing)
            content = {**about, "files": {name: asdict(entry) for name, entry in entries.items()}}
            content["checksum"] = _checksum(content)
            (made / ABOUT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            made.rename(folder)
        except OSError:
            # Another process was first, or the folder exists and holds something else.
            if not (folder / ABOUT).exists():
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except Exception as error:
        # Libraries written in Rust report the system's error in words only.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{folder}: cannot make the cache of {what}: {reason}; name an empty folder that may be written"
        ) from None


@contextmanager
def filling(folder: Path, key: str) -> Iterator[None]:
    """Context manager: inside it, no other command can fill this cache.

    The lock is a file beside the folder, which need not exist yet. On file systems without locks it has no effect.

    Args:
        folder: of the cache.
        key: the configuration key that names it, for messages.

    Raises:
        UserError: another command is filling it.
    """
    held: IO[str] | None = None
    path = _lock_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = hold(path)
    except Taken as other:
        raise UserError(
            f"{key}: {folder}: {other} is filling it; wait for it, or stop it and run vlm-distill cache again, which "
            "continues with what is missing"
        ) from None
    except OSError:
        pass  # if nothing can be written here, writing the cache itself reports it
    try:
        yield
    finally:
        if held is not None:
            held.close()


def check_not_filling(folder: Path, key: str) -> None:
    """Raise ``UserError`` if a command is filling a cache that a run is about to read."""
    other = holder(_lock_of(folder))
    if other is not None:
        raise UserError(f"{key}: {folder}: {other} is filling it; start the run when that is done")


def _lock_of(folder: Path) -> Path:
    real = folder.resolve()
    return real.with_name(f".{real.name}.lock")


def read_about(folder: Path, shape: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of ``cache.json`` without checksums, after checking these.

    Args:
        folder: of a cache.
        shape: required keys and their types.

    Raises:
        UserError: it cannot be read, or it or one of the files that never change is damaged.
    """
    path = folder / ABOUT
    try:
        found = read_object(path, shape)
        checksum = found.pop("checksum", None)
        if checksum is None:
            raise UserError(f"{path}: has no checksum (an earlier version wrote it)")
        if checksum != _checksum(found):
            raise UserError(f"{path}: damaged (its checksum does not match)")
        manifest.check(folder, manifest.entries_from(found.pop("files")))
    except UserError as error:
        raise UserError(f"{error}; put it back from a copy, or delete {folder} to fill it again") from None
    return found


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def compare(folder: Path, what: str, found: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Raise ``UserError`` if a cache's identity is not ``identity``, naming the first difference."""
    for key in [*identity, *(key for key in found if key not in identity)]:
        old, new = found.get(key, "none"), identity.get(key, "none")
        if old != new:
            raise UserError(
                f"{folder}: its {what} were made with another {key}: {old} there, {new} here; name another folder, or "
                "delete this one to fill it again"
            )


def check_room(folder: Path, what: str, needed: float, remedy: str) -> None:
    """Raise ``UserError`` if fewer than ``needed`` bytes are free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} take {in_words(needed)} and {in_words(free)} are free; make room, choose another "
            f"folder, or {remedy}"
        )


def in_words(size: float) -> str:
    """Return a number of bytes in the largest unit that fits, such as ``1.18 MB``."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} bytes"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict's names, types, shapes and bytes, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
