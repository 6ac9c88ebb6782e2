"""Read configuration files: YAML, its bases and ``key=value`` overrides; every mistake is one line."""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from data.errors import UserError

from .confidential import secret_in
from .fields import Section
from .interpolations import check_expansion, escaped
from .sections import AnyRun, RunConfig

T = TypeVar("T", bound=BaseModel)
#: Values in a configuration with its YAML aliases written out.
_MOST_NODES = 100_000
_MOST_BYTES = 10_000_000


@overload
def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig: ...
@overload
def load_config(path: str | Path, overrides: Sequence[str], kind: type[T]) -> T: ...
def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[BaseModel] = RunConfig) -> Any:
    """Read, merge and validate a run's configuration.

    Each file is a layer, and all overrides together are one. A layer's values replace those of the layers below, and
    also the values of keys that they exclude (``Section.replaces``).

    Args:
        path: a YAML file. A key ``base`` names another file, relative to this one, that this one is merged onto, or a
            list of files, each merged onto those before it. ``deepspeed`` may name a JSON file, relative to this one
            (in an override, to the working directory), and replaces the section below.
        overrides: ``section.key=value``; list items by number, as in ``loss.0.weight=0.5``.
        kind: the model of the file.

    Raises:
        UserError: one line that says what is wrong, where, and what to do.
    """
    plain = _resolved(merged_config(path, overrides, kind), str(path))
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, kind)}") from None


def merged_config(path: str | Path, overrides: Sequence[str] = (), kind: type[BaseModel] = RunConfig) -> dict[Any, Any]:
    """Return a configuration's layers merged, neither validated nor with interpolations resolved."""
    layers = _Layers(kind)
    merged = layers.read(Path(path))
    layers.override(merged, overrides)
    return merged


def save_config(config: AnyRun, path: Path, comments: Sequence[str] = ()) -> None:
    """Write the resolved configuration below the comments; running the file repeats the run."""
    plain = escaped(config.model_dump(exclude_none=True))
    if config.optimizer.max_grad_norm is None:
        plain["optimizer"]["max_grad_norm"] = None  # the one key where null is not the default
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    path.write_text("".join(f"# {comment}\n" for comment in comments) + text, encoding="utf-8")


def read_saved(path: Path) -> Any:
    """Return what :func:`save_config` wrote, as plain values, not validated. Raise ``UserError`` for anything else."""
    return _resolved(read_yaml(path), str(path))


# Layers: files and overrides


class _Layers:
    """Files and overrides of one kind of configuration, merged in layers; interpolations are not resolved."""

    def __init__(self, kind: type[BaseModel]) -> None:
        self.sections = sorted(kind.model_fields)
        self.replaces = _replaces(kind)
        # Each file is read once: a chain of files that each name the next one twice would otherwise take forever.
        self.known: dict[Path, dict[Any, Any]] = {}

    def read(self, path: Path, above: tuple[Path, ...] = ()) -> dict[Any, Any]:
        """Return a file merged onto its bases; ``above`` holds the files that name it as their base."""
        if not _is_file(path):
            raise UserError(
                f"{str(path)[:200]}: no such configuration file; `vlm-distill configs` lists those that ship"
            )
        resolved = path.resolve()
        if resolved in above:
            raise UserError(f"{path}: base files name each other in a circle")
        if resolved not in self.known:
            self.known[resolved] = self._read(path, (*above, resolved))
        return copy.deepcopy(self.known[resolved])

    def _read(self, path: Path, above: tuple[Path, ...]) -> dict[Any, Any]:
        layer = read_yaml(path)
        if not isinstance(layer, dict):
            raise UserError(f"{path}: a configuration is a mapping with sections such as student, loss and data")
        if len(above) > 1 and layer and not layer.keys() & {"base", *self.sections}:
            # Its keys are not shown: a base may be any file, even one that the user should not see.
            raise UserError(f"{path}: base: has none of a configuration's sections, {', '.join(self.sections)}")
        merged: dict[Any, Any] = {}
        for base in _bases(layer, path):
            self._lay(merged, self.read(path.parent / base, above))
        layer.pop("base", None)
        if isinstance(layer.get("deepspeed"), str):
            named = _evaluated(layer, "deepspeed", path)
            layer["deepspeed"] = _read_deepspeed(path.parent / str(named), f"{path}: deepspeed")
            merged.pop("deepspeed", None)
        self._lay(merged, layer)
        return merged

    def _lay(self, lower: dict[Any, Any], upper: Mapping[Any, Any]) -> None:
        self._make_room(lower, _settings(upper))
        _merge(lower, upper)

    def override(self, merged: dict[Any, Any], overrides: Sequence[str]) -> None:
        """Merge the overrides into the files, in place, as one layer; a file of DeepSpeed's goes below them."""
        values = []
        for text in overrides:
            key, value = parse_override(text)
            if key == "deepspeed" and isinstance(value, str):
                merged[key] = _read_deepspeed(Path(value), f"override {text[:200]!r}")
            else:
                values.append((text, key, value))
        settings: list[tuple[str, Any]] = []
        for _, key, value in values:
            settings += _settings(_tree(key, value))
        self._make_room(merged, settings)
        for text, key, value in values:
            try:
                _put(merged, key.split("."), value)
            except LookupError as error:
                raise UserError(f"override {text[:200]!r}: {error.args[0]}") from None

    def _make_room(self, lower: dict[Any, Any], settings: Iterable[tuple[str, Any]]) -> None:
        """Remove what a layer's settings exclude. Conflicts within the layer stay, and are refused later."""
        chosen = {key for key, value in settings if not _neutral(value)}
        for key in chosen:
            for other in self.replaces.get(key, ()):
                if other not in chosen:
                    _drop(lower, other)


def _bases(layer: dict[Any, Any], path: Path) -> list[str]:
    """Return the names of the files that a layer builds on."""
    named = _evaluated(layer, "base", path) if "base" in layer else None
    if named is None:
        return []
    names = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: base: give a file's name, or a list of names")
    return names


def _evaluated(layer: dict[Any, Any], key: str, path: Path) -> Any:
    """Return one value of a layer, with interpolations resolved within the layer."""
    check_expansion(layer, str(path))
    try:
        value = OmegaConf.create(layer)[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except Exception as error:
        raise UserError(f"{path}: {key}: {_first_line(error)}") from None


def _read_deepspeed(path: Path, where: str) -> dict[str, Any]:
    """Return the section ``deepspeed`` from a JSON file for DeepSpeed or Hugging Face's Trainer."""
    if not _is_file(path):
        raise UserError(f"{where}: {str(path)[:200]}: no such file of DeepSpeed's configuration")
    try:
        section = json.loads(_text_of(path), object_pairs_hook=_each_key_once)
    except ValueError as error:
        raise UserError(f"{where}: {path}: not readable as JSON: {_first_line(error)}") from None
    if not isinstance(section, dict):
        raise UserError(f"{where}: {path}: DeepSpeed's configuration is a mapping of keys such as zero_optimization")
    return escaped(section)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise ``ValueError`` for a duplicate key: JSON's reader would keep the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given twice")
        found[key] = value
    return found


def _merge(lower: dict[Any, Any], upper: Mapping[Any, Any]) -> None:
    """Merge ``upper`` into ``lower``: sections key by key; lists and values are replaced."""
    for key, value in upper.items():
        if isinstance(value, dict) and isinstance(lower.get(key), dict):
            _merge(lower[key], value)
        else:
            lower[key] = value


def parse_override(text: str) -> tuple[str, Any]:
    """Return the dotted key of ``section.key=value``, and its value read as YAML.

    Raises:
        UserError: the text is no override.
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"override {text[:200]!r}: write it as section.key=value")
    key = re.sub(r"\[(\w+)\]", r".\1", key)
    if not all(key.split(".")):
        raise UserError(f"override {text[:200]!r}: {key!r} is not a key such as training.steps")
    _check(f"override {key}", text)
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        return key, _name_on(plain["value"])  # type: ignore[index, call-overload]
    except Exception as error:  # the library raises many kinds of errors for odd values
        raise UserError(f"override {text[:200]!r}: {_first_line(error)}") from None


def _put(tree: Any, keys: Sequence[str], value: Any) -> None:
    """Set a value by its dotted key. Raise ``LookupError`` with a sentence if there is no such place."""
    for depth, key in enumerate(keys):
        name = ".".join(keys[:depth])
        index: Any = key
        if isinstance(tree, list):
            if not key.isdigit() or int(key) >= len(tree):
                raise LookupError(f"{name} {_numbered(tree)}")
            index = int(key)
        elif not isinstance(tree, dict):
            raise LookupError(f"{name} is {_shown(tree)}, not a section")
        if depth == len(keys) - 1:
            both = isinstance(value, dict) and isinstance(tree, dict) and isinstance(tree.get(index), dict)
            if both:
                _merge(tree[index], value)
            else:
                tree[index] = value
        elif isinstance(tree, dict) and tree.get(index) is None:
            if value is None and index in tree:
                return  # emptied in a section that is left out: it stays left out
            if keys[depth + 1].isdigit():
                raise LookupError(f"{'.'.join(keys[: depth + 1])} has no entries; give it as a list, [{{…}}]")
            tree[index] = {}
        tree = tree[index]


def _numbered(entries: Sequence[Any]) -> str:
    count = len(entries)
    if count == 0:
        return "has no entries; give it as a list, [{…}]"
    return f"has {count} {'entry, numbered 0' if count == 1 else f'entries, numbered 0 to {count - 1}'}"


def _tree(key: str, value: Any) -> Any:
    """Return nested mappings with a value at its dotted key."""
    for step in reversed(key.split(".")):
        value = {step: value}
    return value


def _settings(tree: Mapping[Any, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every section and value with its dotted key, except inside lists."""
    for key, value in tree.items():
        yield f"{at}{key}", value
        if isinstance(value, dict):
            yield from _settings(value, f"{at}{key}.")


def _neutral(value: Any) -> bool:
    """Return whether a value chooses nothing, so that it excludes no key of the layers below."""
    return value is None or value is False or value in ("auto", "replicate", "multistep")


def _drop(tree: Any, key: str) -> None:
    *way, last = key.split(".")
    for step in way:
        tree = tree.get(step) if isinstance(tree, dict) else None
    if isinstance(tree, dict):
        tree.pop(last, None)


def _replaces(kind: type[BaseModel], at: str = "") -> dict[str, list[str]]:
    """Return ``Section.replaces`` of all sections of a configuration, with full dotted keys."""
    found: dict[str, list[str]] = {}
    if issubclass(kind, Section):
        for key, others in kind.replaces.items():
            found[f"{at}{key}"] = [f"{at}{other}" for other in others]
    for name, field in kind.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            found |= _replaces(inner, f"{at}{name}.")
    return found


# Values


def _resolved(tree: Any, where: str) -> Any:
    """Return a configuration with interpolations resolved; every value is checked before and after."""
    check_values(tree, where)
    check_expansion(tree, where)
    try:
        plain = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except Exception as error:  # circular interpolations, functions that fail
        raise UserError(f"{where}: {_first_line(error)}") from None
    check_values(plain, where)
    return plain


def check_values(tree: Any, where: str) -> None:
    """Raise ``UserError`` for a value that no setting can have, and for secrets, which would be saved with the run."""
    try:
        leaves = list(_leaves(tree))
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None
    for name, leaf in leaves:
        _check(f"{where}: {name}", leaf)


# Files


def read_yaml(path: Path) -> Any:
    """Return a YAML file as plain values, interpolations not resolved. Raise ``UserError`` for anything else."""
    try:
        text = _text_of(path)
        # Parsed in Python first, where deep nesting raises an error; OmegaConf's C parser would crash the process.
        if _nodes(yaml.compose(text, Loader=yaml.SafeLoader), {}) > _MOST_NODES:
            raise ValueError(
                f"with its aliases written out it has more than {_MOST_NODES:,} values, or they are circular"
            )
        loaded = OmegaConf.load(path)
        return _name_on(OmegaConf.to_container(loaded) if OmegaConf.is_config(loaded) else loaded)
    except yaml.MarkedYAMLError as error:
        # Without the text around it, which the library quotes: a base may be any file, and must not be shown.
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise UserError(f"{path}{place}: not readable as YAML: {_without_quotes(error)}") from None
    except Exception as error:  # invalid dates, tags, bytes that are not text, and more
        raise UserError(f"{path}: not readable as YAML: {_first_line(error)}") from None


def _name_on(plain: Any) -> Any:
    """Return values with the key ``on`` of loss terms, which YAML 1.1 reads as true, at any depth."""
    if isinstance(plain, list):
        return [_name_on(value) for value in plain]
    if isinstance(plain, dict):
        return {"on" if key is True else key: _name_on(value) for key, value in plain.items()}
    return plain


def _text_of(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes, which no configuration has")
    return path.read_text("utf-8-sig")


def _without_quotes(error: yaml.MarkedYAMLError) -> str:
    """Return what the YAML parser found wrong, without the names that it quotes."""
    return re.sub(r"'[^']{2,}'", "'…'", error.problem or "") or type(error).__name__


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _nodes(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return how many values a document has with aliases written out; infinity if they are circular."""
    if node is None or id(node) in known:
        return known.get(id(node), 0.0)
    known[id(node)] = math.inf
    inner: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
    count = 1.0
    for item in inner:
        for part in item if isinstance(item, tuple) else (item,):
            count += _nodes(part, known)
    known[id(node)] = count
    return known[id(node)]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a configuration with its dotted key."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _check(where: str, value: Any) -> None:
    """Refuse values that no setting can have, and secrets, which would be saved with the results."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {value} is not a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{where}: this number is too large")
    if isinstance(value, str) and (secret := secret_in(value)):
        raise UserError(
            f"{where}: holds {secret}, which would be saved with the run; leave it out: libraries read "
            "HF_TOKEN, WANDB_API_KEY and the like from the environment by themselves"
        )


def _first_line(error: Exception) -> str:
    """Return an error's message as one line; the key that OmegaConf appends comes first."""
    message, _, ending = str(error).partition("\n    full_key: ")
    key = ending.partition("\n")[0]
    said = f"{key}: {message}" if key else message
    return " ".join(said.split())[:200] or type(error).__name__


# Errors


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Return the first few errors of validating ``root`` in one line, each as ``key: what is wrong``."""
    parts = []
    for item in error.errors()[:3]:
        where = ".".join(_without_alternatives(root, item["loc"]))
        if item["type"] == "extra_forbidden":
            parts.append(f"{where}: unknown key; {_hint(root, item['loc'])}")
        elif item["type"] == "missing":
            parts.append(f"{where}: missing; it has no default")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["input"] is None:
                message = "is empty; give a value, or leave the key out"
            elif item["type"] == "model_type":
                message = f"give a mapping with keys such as {', '.join(_fields_at(root, item['loc'])[:3])}"
            elif item["type"] == "list_type":
                message = "give a list"
            elif item["type"] == "too_short":
                message = "is an empty list; give at least one entry"
            found = "" if isinstance(item["input"], dict | list | None) else f" (found {_shown(item['input'])})"
            parts.append(f"{where}: {message}{found}" if where else f"{message}{found}")
    more = len(error.errors()) - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _hint(root: type[BaseModel], location: tuple[int | str, ...]) -> str:
    """Return what an unknown key may have been meant for."""
    key, known = str(location[-1]), sorted(_fields_at(root, location[:-1]))
    homes = [name for name, field in root.model_fields.items() if key in _keys_of(field.annotation)]
    if len(homes) == 1 and homes[0] != location[0]:
        return f"it belongs under {homes[0]}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


def _keys_of(annotation: Any) -> set[str]:
    section = _section_of(annotation)
    return set() if section is None else set(section.model_fields)


def _without_alternatives(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return a dotted key's parts, without the names that pydantic inserts for the members of a union."""
    model: Any = root
    parts: list[str] = []
    for step in location:
        fields = getattr(model, "model_fields", {})
        if step in fields:
            model = _section_of(fields[step].annotation)
        elif step in ("bool", getattr(model, "__name__", None)) or re.search(r"^\[key\]$|^(literal|list)\[", str(step)):
            continue
        parts.append(str(step))
    return parts


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}…"


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys of a section, found by walking the models' annotations along an error's location."""
    model: Any = root
    for step in location:
        if isinstance(step, int) or step == model.__name__:  # the model's name is inserted for a union
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
