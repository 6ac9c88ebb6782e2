"""A configuration's file: YAML with its bases and ``key=value`` overrides, every mistake told in one line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import BaseModel, ValidationError

from data.errors import UserError

from .confidential import secret_in
from .config import AnyRun, RunConfig

T = TypeVar("T", bound=BaseModel)
#: In a configuration with its aliases written out.
_MOST_NODES = 100_000


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: type[T]) -> T: ...
def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[BaseModel] = RunConfig) -> Any:
    """Reads, merges and validates a run's configuration.

    Args:
        path: a YAML file. A key ``base`` names another file, relative to this one, that this one is merged onto, or a
            list of files, each merged onto those before it.
        overrides: ``section.key=value``; list items by number, as in ``loss.0.weight=0.5``.
        kind: what the file configures.

    Raises:
        UserError: one line that says what is wrong, where, and what to do.
    """
    merged = _read(Path(path), ())
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UserError(f"override {text!r}: write it as section.key=value")
        _check(f"override {key}", text)
        try:
            OmegaConf.update(merged, key, OmegaConf.from_dotlist([f"value={value}"]).value)
        except Exception as error:  # of odd keys and values the library makes almost anything
            raise UserError(f"override {text[:200]!r}: {_first_line(error)}") from None
    for resolve in (False, True):
        try:
            plain = OmegaConf.to_container(merged, resolve=resolve)
            leaves = list(_leaves(plain))
        except Exception as error:  # interpolations in a circle, too deep, to a function that fails
            raise UserError(f"{path}: {_first_line(error)}") from None
        for name, leaf in leaves:
            _check(f"{path}: {name}", leaf)
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, kind)}") from None


def save_config(config: AnyRun, path: Path) -> None:
    """Writes the resolved configuration; running it again repeats the run."""
    path.write_text(yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True))


def _read(path: Path, seen: tuple[Path, ...]) -> Any:
    if not _is_file(path):
        raise UserError(f"{str(path)[:200]}: no such configuration file; the ones that ship are under configs/")
    if path.resolve() in seen:
        raise UserError(f"{path}: base files name each other in a circle")
    loaded = read_yaml(path)
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: a configuration is a mapping with sections such as student, loss and data")
    try:
        named = loaded.pop("base", None)
        bases = [str(base) for base in (named if isinstance(named, ListConfig) else [] if named is None else [named])]
    except Exception as error:
        raise UserError(f"{path}: base: {_first_line(error)}") from None
    found = [_read(path.parent / base, (*seen, path.resolve())) for base in bases]
    try:
        return OmegaConf.merge(*found, loaded)
    except Exception as error:
        raise UserError(f"{path}: does not go together with its base: {_first_line(error)}") from None


def read_yaml(path: Path) -> Any:
    """A YAML file as OmegaConf has it, interpolations not resolved. Raises ``UserError`` for what is none."""
    try:
        text = path.read_text("utf-8-sig")
        # In Python, whose stack ends in an error: OmegaConf's parser is C, and a file nested deeply would be the end.
        if _nodes(yaml.compose(text, Loader=yaml.SafeLoader), {}) > _MOST_NODES:
            raise ValueError(f"its aliases make more than {_MOST_NODES:,} values of it, or name each other in a circle")
        return OmegaConf.load(path)
    except Exception as error:  # of dates that are none, tags, bytes that are no text, anything
        raise UserError(f"{path}: not readable as YAML: {_first_line(error)}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _nodes(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many values a document has once its aliases are written out; infinitely many where they go in a circle."""
    if node is None or id(node) in known:
        return known.get(id(node), 0.0)
    known[id(node)] = math.inf
    inner: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
    known[id(node)] = 1.0 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration with its dotted key."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _check(where: str, value: Any) -> None:
    """Refuses what no setting is, and what must not be saved beside the results."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is no finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: this number is too large")
    if isinstance(value, str) and (secret := secret_in(value)):
        raise UserError(
            f"{where}: holds {secret}, which would be saved with the run; leave it out: libraries read "
            "HF_TOKEN, WANDB_API_KEY and the like from the environment by themselves"
        )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first few errors of validating ``root``, each as ``key: what is wrong``, in one line."""
    parts = []
    for item in error.errors()[:3]:
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = sorted(_fields_at(root, item["loc"][:-1]))
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            parts.append(f"{where}: unknown key; {hint}")
        elif item["type"] == "missing":
            parts.append(f"{where}: missing; it has no default")
        else:
            message = item["msg"].removeprefix("Value error, ")
            found = "" if isinstance(item["input"], dict | list) else f" (found {_shown(item['input'])})"
            parts.append(f"{where or 'the file'}: {message}{found}")
    more = len(error.errors()) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys a section knows, found by walking the models' annotations along an error's location."""
    model: Any = root
    for step in location:
        if isinstance(step, int):
            continue
        model = _section_of(model.model_fields[step].annotation)
    return list(model.model_fields)


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
