"""Open tables with the ``datasets`` library: from its hub by name, and from local folders only the files in them.

A folder may come from anyone. The library would follow a folder's README.md or script to other folders and computers.
Here the parquet and arrow files are listed, and the library is given nothing else.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .paths import SPLITS, choose_split

_SUFFIXES = (".parquet", ".arrow")
#: The library's names for parts of a split: ``train-00000-of-00004``.
_PART = re.compile(r"(.+?)-[0-9]{5}-of-[0-9]+.*")
#: Words for a split in the names of files and folders; validation and test have several.
_WORDS = {**{split: split for split in SPLITS}, "training": "train", "testing": "test", "dev": "validation"}
_WORDS |= {"eval": "test", "evaluation": "test", "val": "validation", "valid": "validation"}
_DESCRIPTION = 16 << 20  # bytes of a JSON file that describes a table


def open_dataset(path: Path, given: str, split: str | None, config: str | None) -> Any:
    """Return a ``datasets.Dataset``: a file, a folder of parquet or arrow files, a saved data set, or one of the hub.

    Args:
        path: what the user named, as a path.
        given: the same as the user wrote it, for messages and as a name on the hub.
        split: the split, if there are several. In a folder, files and folders are named by their split.
        config: the configuration; in a folder, a folder of that name.

    Raises:
        UserError: the path does not exist or cannot be read, a file is outside the folder, or the split is ambiguous.
    """
    import datasets  # takes seconds to import; JSON files do without

    if path.is_file() or (path / "state.json").is_file():
        if split or config:
            raise UserError(f"{given} is a single table and has no split or config; leave them out")
        return open_files([path]) if path.is_file() else _saved(path, given)
    if (path / "dataset_dict.json").is_file():
        names = _description(path / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(map(_is_plain_name, names)):
            raise UserError(f"{path / 'dataset_dict.json'} does not list splits by name; save the data set again")
        return _saved(path / choose_split(given, split, names), given)
    if path.is_dir():
        return open_files(_files_of_split(path, given, split, config))
    splits = _loaded(given, lambda: datasets.get_dataset_split_names(given, config_name=config))
    chosen = choose_split(given, split, splits)
    return _loaded(given, lambda: datasets.load_dataset(given, name=config, split=chosen))


def open_files(files: Sequence[Path]) -> Any:
    """Return a data set of several parquet or arrow files, rows in the order of the files."""
    import datasets

    kinds = {"arrow" if file.suffix.lower() == ".arrow" else "parquet" for file in files}
    if len(kinds) > 1:
        raise UserError(f"{files[0].parent} holds parquet and arrow files; keep one kind, or name a file")
    # The library reads names as patterns, and "::" as a file inside another.
    names = [glob.escape(str(file.absolute())) for file in files]
    if odd := next((name for name in names if "::" in name), None):
        raise UserError(f"{odd} has '::' in its name, which datasets does not read as a path; rename it")
    return _loaded(str(files[0]), lambda: datasets.load_dataset(kinds.pop(), data_files=names, split="train"))


def _loaded(given: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises many kinds: unknown name, no network, unknown configuration
        reason = " ".join(str(error).split()) or type(error).__name__
        where = "" if Path(given).exists() else f"no such file or folder in {Path.cwd()}, and from the hub: "
        raise UserError(f"cannot open {given}: {where}{reason[:300]}") from None


def _saved(folder: Path, given: str) -> Any:
    """Open a data set written by ``save_to_disk``. Raise ``UserError`` if it names files outside its folder."""
    import datasets

    state = _description(folder / "state.json")
    for key in ("_data_files", "_indices_data_files"):
        entries = state.get(key) or []
        names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        if not isinstance(entries, list) or len(names) < len(entries) or not all(map(_is_plain_name, names)):
            raise UserError(f"{folder / 'state.json'} names files outside its folder; do not trust this data set")
        _check_inside(folder, [folder / str(name) for name in names])
    return _loaded(given, lambda: datasets.load_from_disk(str(folder)))


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]|::", name)


def _description(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_DESCRIPTION))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); save the data set again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; save the data set again")
    return content


def _check_inside(folder: Path, files: Iterable[Path]) -> None:
    whole = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(whole):
            raise UserError(f"{file} is a link out of {folder}; copy the file into the folder")


# Folders of files.


def _files_of_split(folder: Path, given: str, split: str | None, config: str | None) -> list[Path]:
    base = _folder_of_config(folder, given, config)
    files = _tables(base)
    if not files:
        raise UserError(f"folder {given} holds no parquet or arrow file; for JSON or JSONL, name the file in it")
    _check_inside(folder, files)
    split = _WORDS.get(split or "", split)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(base), split), []).append(file)
    if set(by_split) == {""}:  # no name contains a split: all of it is for training
        by_split = {"train": files}
    return by_split[choose_split(given, split, sorted(filter(None, by_split)))]


def _folder_of_config(folder: Path, given: str, config: str | None) -> Path:
    """Return the folder of a configuration. Without one, raise ``UserError`` if several folders look like one."""
    if config is not None:
        if not all(map(_is_plain_name, config.split("/"))):
            raise UserError(f"config {config!r} of {given} is not the name of a folder; correct it")
        for candidate in (folder / config, folder / "data" / config):
            if candidate.is_dir():
                return candidate
        if config == "default":
            return folder
    named = sorted(
        one.name for one in folder.iterdir() if one.is_dir() and not _is_split_or_data(one.name) and _tables(one)
    )
    if config is not None:
        raise UserError(f"{given} has no folder for config {config!r}; it has {', '.join(named) or 'none'}")
    if len(named) > 1:
        raise UserError(f"{given} has several folders of data; set `config` to one of {', '.join(named)}")
    return folder


def _is_split_or_data(name: str) -> bool:
    return name == "data" or name.lower() in _WORDS


def _tables(folder: Path) -> list[Path]:
    """Return the parquet and arrow files below a folder, without hidden ones."""
    found = []
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in _SUFFIXES and not hidden and (file.is_file() or file.is_symlink()):
            found.append(file)
    return sorted(found)


def _split_of(file: Path, wanted: str | None) -> str:
    """Return the split in a file's name or its folder's; empty if there is none."""
    if wanted and (file.stem == wanted or file.stem.startswith(f"{wanted}-")):
        return wanted
    part = _PART.fullmatch(file.stem)
    if part is not None:
        return _WORDS.get(part[1], part[1])
    words = [*re.split(r"[^A-Za-z0-9]+", file.stem), *reversed(file.parts[:-1])]
    return next((_WORDS.get(word.lower(), word) for word in words if word == wanted or word.lower() in _WORDS), "")
