"""The configurations that ship: what there are, what each is for, and copies of them."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError

#: The folder ``configs``, which is installed inside the package.
FOLDER = (Path(str(files("vlm_distill"))) / "configs").resolve()
#: Which command takes a folder's files; the first that matches. Elsewhere it is ``train``.
_COMMANDS = {
    "benchmarks": "eval",
    "cifar100": "classify",
    "demo/vision": "classify",
    "imagenet": "classify",
    "study/base/vision": "classify",
    "study/base": "train",
    "study": "sweep",
}
#: Folders of files that others build on, which are no runs by themselves.
_PARTS = "base"
# How the files name one another, and the folder that they are in.
_HERE = "configs/"


def names() -> list[str]:
    """Return the names of all configurations that can be run: their paths below ``configs``, without ``.yaml``."""
    found = []
    for path in sorted(FOLDER.rglob("*.yaml")):
        name = path.relative_to(FOLDER).with_suffix("")
        if _PARTS not in name.parts:
            found.append(name.as_posix())
    return found


def matching(start: str) -> list[str]:
    """Return the names in a folder of configurations, or the one configuration of this name.

    Raises:
        UserError: there is none; names the nearest.
    """
    name = start.removeprefix(_HERE).removesuffix(".yaml").strip("/")
    known = names()
    found = [one for one in known if one == name or one.startswith(f"{name}/")]
    if found:
        return found
    # A name without its folder is enough if there is one such file.
    folderless = [one for one in known if one.rpartition("/")[2] == name]
    if len(folderless) == 1:
        return folderless
    near = folderless[:3] or difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "`vlm-distill configs` lists them"
    raise UserError(f"configs: no configuration {start!r}; {hint}")


def command_of(name: str) -> str:
    """Return the command of ``vlm-distill`` that takes a configuration."""
    for folder, command in _COMMANDS.items():
        if name.startswith(f"{folder}/"):
            return command
    return "train"


def about(name: str) -> str:
    """Return the first sentence of a configuration's header: what it is."""
    lines = []
    for line in text_of(name).splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    return re.split(r"\.(?:\s+(?=[^\da-z(])|$)", " ".join(lines))[0].rstrip(";:,")


def text_of(name: str) -> str:
    """Return a configuration's file."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def needed_by(name: str) -> list[Path]:
    """Return a configuration's file and all that it builds on, in order and below ``configs``."""
    found: list[Path] = []
    waiting = [Path(f"{name}.yaml")]
    while waiting:
        path = waiting.pop(0)
        if path in found:
            continue
        found.append(path)
        if path.suffix == ".yaml":
            waiting += _named_in(path)
    return found


def _named_in(path: Path) -> Iterator[Path]:
    """Yield the shipped files that one names: others relative to it, and models as ``configs/…``."""
    for value in _texts(yaml.safe_load((FOLDER / path).read_text(encoding="utf-8"))):
        if value.startswith(_HERE):
            named = Path(value.removeprefix(_HERE))
        elif value.endswith(".yaml"):
            named = Path(os.path.normpath(path.parent / value))
        else:
            continue
        if (FOLDER / named).is_file():
            yield named
        elif (FOLDER / named).is_dir():
            yield from sorted(file.relative_to(FOLDER) for file in (FOLDER / named).iterdir())


def _texts(tree: Any) -> Iterator[str]:
    """Yield all texts of a file."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(value)


def copy(name: str, destination: Path) -> list[Path]:
    """Copy a configuration, and what it builds on. Return the paths of the copies, its own first.

    Into a folder, everything is copied under its name below ``configs``; what the files say of ``configs/`` then means
    that folder. A configuration that builds on no other may be copied to a file, ``my.yaml``.

    Raises:
        UserError: a file is there already with another content, or one file is not enough.
    """
    needed = needed_by(name)
    to_file = destination.suffix in (".yaml", ".yml")
    if to_file and len(needed) > 1:
        others = ", ".join(str(path) for path in needed[1:3])
        raise UserError(f"configs: {name} builds on other files ({others}); name a folder for all of them, as configs")
    copies: dict[Path, bytes] = {}
    for path in needed:
        content = (FOLDER / path).read_bytes()
        target = destination if to_file else destination / path
        if path.suffix == ".yaml":
            content = _renamed(content.decode(), path, destination, to_file=to_file).encode()
        copies[target] = content

    # Look at all places before the first is written.
    for target, content in copies.items():
        if target.exists() and target.read_bytes() != content:
            raise UserError(f"configs: {target}: already exists, with other content; choose another place")
    for target, content in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return list(copies)


def _renamed(text: str, path: Path, destination: Path, *, to_file: bool) -> str:
    """Return a file's text with the paths of the copies in place of those in the repository."""
    if to_file:
        return text.replace(f"{_HERE}{path.as_posix()}", destination.as_posix())
    return re.sub(rf"(?<![\w/.]){_HERE}", f"{destination.as_posix()}/", text)
