"""Reference pages of configuration files: every key with type, default, meaning and an example, from the models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from markdown_parts import definition, heading
from pydantic.fields import FieldInfo

from vlm_distill.config.fields import Section

#: In a path: the number of an entry of a list, and a name that the file chooses.
NUMBER, NAME = "N", "NAME"
_LONGEST_EXAMPLE = 72
#: What the keys are that a section takes beside its own.
_OTHER_KEYS = {
    f"loss.{NUMBER}": "Other keys are [parameters of the loss](losses.md).",
    "deepspeed": "Other keys are those of DeepSpeed's own configuration, and are passed on "
    "([scaling](../scaling.md#deepspeeds-own-settings)).",
}
#: A YAML block of a page, with its mark (tests/test_docs.py).
_BLOCK = re.compile(r"(?:<!-- test: (.*?) -->\n)?^```yaml\n(.*?)^```", re.S | re.M)
_BOUNDS = {"gt": "above", "ge": "at least", "min": "at least", "lt": "below", "le": "at most", "max": "at most"}
_WORDS = {
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    bool: "`true` or `false`",
    Any: "any value",
}


@dataclass(frozen=True)
class Example:
    """A configuration that is shipped or shown, from which examples are taken.

    Attributes:
        content: as parsed.
        file: its path in the repository; ``None`` for a block of a page.
    """

    content: Any
    file: str | None


def page_of(title: str, introduction: str, root: type[Section], examples: Iterable[Example]) -> str:
    """Return the page about a kind of file.

    Args:
        title: of the page.
        introduction: Markdown in front of the keys.
        root: the file's model.
        examples: files of this kind, the best ones first.
    """
    examples = list(examples)
    parts = [f"# {title}\n\n{introduction}\n"]
    homes: dict[type[Section], str] = {}
    anchors: dict[type[Section], str] = {}
    for path, section in sections_of(root):
        if section not in homes:
            # A key may hold one section or another: their first keys tell them apart.
            taken = path in homes.values()
            anchors[section] = f"{path}-{next(iter(section.model_fields))}" if taken else path
            homes[section] = path
    for section, path in homes.items():
        if path:
            parts.append(heading(2 if "." not in path else 3, f"`{path}`", anchor=anchors[section]))
        parts.append(f"{(section.__doc__ or '').strip().splitlines()[0]}\n")
        for name, field in section.model_fields.items():
            key = f"{path}.{name}".strip(".")
            parts.append(_entry(key, name, field, anchors, examples))
        if section.model_config.get("extra") == "allow":
            parts.append(f"{_OTHER_KEYS[path]}\n")
    return "\n".join(parts)


def sections_of(root: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield a model and all sections in it with their paths, each section before those inside it."""
    yield path, root
    for name, field in root.model_fields.items():
        for suffix, section in _inside(field.annotation):
            yield from sections_of(section, f"{path}.{name}{suffix}".strip("."))


def _inside(annotation: Any) -> Iterator[tuple[str, type[Section]]]:
    """Yield the sections that a type holds, with what their paths add to the key's."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield "", annotation
        return
    origin = get_origin(annotation)
    added = {list: f".{NUMBER}", tuple: f".{NUMBER}", dict: f".{NAME}"}.get(origin, "")
    for part in get_args(annotation):
        for suffix, section in _inside(part):
            yield added + suffix, section


def _entry(
    key: str, name: str, field: FieldInfo, anchors: Mapping[type[Section], str], examples: Iterable[Example]
) -> str:
    """Return a key's entry."""
    facts = [in_words(field.annotation, field.metadata, anchors), default_of(field)]
    text = "; ".join(fact for fact in facts if fact)
    body = f"{text[:1].upper()}{text[1:]}. {field.description}"
    example = example_of(key, field, examples)
    if example:
        body += f"\n\nExample: {example}"
    # The anchor of a section is that of its heading.
    return definition(f"`{name}`", body, anchor="" if key in anchors.values() else key)


def in_words(annotation: Any, metadata: Iterable[Any], anchors: Mapping[type[Section], str]) -> str:
    """Return a type in words, such as ``whole number above 0``; sections are links to their own keys."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        first, *rest = parts
        inner = [item for one in rest for item in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return in_words(first, [*inner, *metadata], anchors)
    if origin in (Union, UnionType):
        return " or ".join(in_words(part, metadata, anchors) for part in parts if part is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list or (origin is tuple and parts[-1] is Ellipsis):
        return f"list of {in_words(parts[0], (), anchors)}"
    if origin is tuple:
        return f"list of {len(parts)}: {in_words(parts[0], (), anchors)}"
    if origin is dict:
        return f"mapping to {in_words(parts[1], (), anchors)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"[Section](#{anchors[annotation]})"
    words = _WORDS.get(annotation, str(annotation))
    return " ".join([words, " and ".join(_bounds(metadata))]).strip()


def _bounds(metadata: Iterable[Any]) -> list[str]:
    """Return the bounds of a number, such as ``above 0``."""
    found = []
    for item in metadata:
        for name, word in _BOUNDS.items():
            if getattr(item, name, None) is not None:
                found.append(f"{word} {getattr(item, name):g}")
    return found


def default_of(field: FieldInfo) -> str:
    """Return what holds when a key is left out."""
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Section) or any(isinstance(one, Section) for one in _listed(default)):
        return ""
    return "optional" if default is None else f"default `{as_yaml(default)}`"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def as_yaml(value: Any) -> str:
    """Return a value in one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def example_of(key: str, field: FieldInfo, examples: Iterable[Example]) -> str:
    """Return an example of a key: from a file, from a page, or one that its type allows; none of a long section.

    Raises:
        ValueError: there is no example.
    """
    name = key.rpartition(".")[2]
    for example in examples:
        for value in _values_at(example.content, key.split(".")):
            text = as_yaml({name: value})[1:-1]
            if value is None or len(text) > _LONGEST_EXAMPLE or value == field.default:
                continue
            source = "" if example.file is None else f" in [{example.file}](../../{example.file})"
            return f"`{text}`{source}"
    value = _allowed(field)
    if value is None and list(_inside(field.annotation)):
        return ""
    if value is None:
        raise ValueError(f"no example of {key}: add one to docs/site/examples.yaml")
    return f"`{as_yaml({name: value})[1:-1]}`"


def _allowed(field: FieldInfo) -> Any:
    """Return a value that a field's type names: another choice than the default, the opposite, or the default."""
    if field.annotation is bool:
        return not field.default
    choices = [value for part in [field.annotation, *get_args(field.annotation)] for value in _choices(part)]
    others = [value for value in choices if value != field.default]
    if others:
        return others[0]
    return field.default if isinstance(field.default, int | float | str) else None


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _values_at(content: Any, path: list[str]) -> Iterator[Any]:
    """Yield the values at a path, in which ``N`` is any entry of a list and ``NAME`` any of a mapping."""
    if not path:
        yield content
        return
    first, *rest = path
    inside: list[Any] = []
    if first == NUMBER and isinstance(content, list | tuple):
        inside = list(content)
    elif first == NAME and isinstance(content, dict):
        inside = list(content.values())
    elif isinstance(content, dict) and first in content:
        inside = [content[first]]
    for part in inside:
        yield from _values_at(part, rest)


class Configurations:
    """What examples are taken from, by the kind of file: shipped files, blocks of pages, ``examples.yaml``.

    Args:
        root: the repository.
    """

    def __init__(self, root: Path) -> None:
        self.runs: list[Example] = []
        self.classifiers: list[Example] = []
        self.sweeps: list[Example] = []
        self.benchmarks: list[Example] = []
        files = sorted((root / "configs").rglob("*.yaml"), key=lambda file: (len(file.parts), file))
        for file in files:
            name = file.relative_to(root).as_posix()
            content = yaml.safe_load(file.read_text("utf-8"))
            self._of_kind(name, name, content).append(Example(content, name))
        own = yaml.safe_load((root / "docs/site/examples.yaml").read_text("utf-8"))
        for page in sorted((root / "docs").glob("*.md")):
            for mark, text in _BLOCK.findall(page.read_text("utf-8")):
                if not mark.startswith("skip"):
                    content = _whole(mark, yaml.safe_load(text))
                    self._of_kind(page.name, mark, content).append(Example(content, None))
        for kind, content in own.items():
            getattr(self, kind).append(Example(content, None))

    def _of_kind(self, name: str, mark: str, content: Any) -> list[Example]:
        """Return the list that a file or block belongs to, by its name, its mark in the page, and its keys."""
        if isinstance(content, dict) and "axes" in content:
            return self.sweeps
        if "benchmark" in mark:
            return self.benchmarks
        if any(word in name for word in ("vision", "imagenet", "cifar")):
            return self.classifiers
        return self.runs


def _whole(mark: str, content: Any) -> Any:
    """Return a block's content as a whole configuration, if its mark names the section that it belongs to."""
    if mark.startswith("in "):
        for key in reversed(mark.removeprefix("in ").split(".")):
            content = {key: content}
    return content
