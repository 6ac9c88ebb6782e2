"""Reference pages of the Python API and of losses, from signatures and docstrings; nothing is imported for them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import griffe
from markdown_parts import definition, heading

_ROLE = re.compile(r":\w+:`~?\.*([\w.]+)`")
_CODE = re.compile(r"(``.*?``|`.*?`)", re.S)

_OF_LOSSES = """
build available register fused_linear on_logits Term DistillationLoss Divergence Progress RowResult HiddenTargets
TopKTargets TokenTargets MixedTargets TokenGroups LossSums TermSums FeatureLoss FeatureTerm BatchLoss Standardised
LossError
"""
#: Modules, each with its introduction and the names that are shown of it.
MODULES = {
    "vlm_distill": (
        "Distil, evaluate and load models from a program: `import vlm_distill as vd`. [From Python](../python.md) has "
        "examples.",
        "distill DistilledRun evaluate load_vlm UserError",
    ),
    "vlm_distill.losses": (
        "Losses for your own training loop. They need torch and nothing else of this project. N is a number of tokens, "
        "V the size of the vocabulary, H the hidden size. The losses themselves are on [their own page](losses.md).",
        _OF_LOSSES,
    ),
    "vlm_distill.integrations.transformers": (
        "The losses in Transformers' own trainer, without full logits.",
        "DistillationTrainer DistillationMixin",
    ),
}
_LOSSES = """# Losses and their parameters

A term of a run's `loss` is `{name: NAME, weight: 1.0, PARAMETER: …}`; the same names and parameters go into
`vlm_distill.losses.build`. [Losses](../losses.md) has their formulas side by side, and says which one to choose.
"""


class Api:
    """The packages, read from their source.

    Args:
        root: the repository.
    """

    def __init__(self, root: Path) -> None:
        logging.getLogger("griffe").setLevel(logging.ERROR)  # "alpha, beta: …" describes two parameters in one line
        loader = griffe.GriffeLoader(search_paths=[root], docstring_parser=griffe.Parser.google)
        self._packages = {name: loader.load(name) for name in ("vlm_distill", "vision", "data")}
        loader.resolve_aliases(implicit=True)

    def find(self, path: str) -> Any:
        """Return a module, class or function by its dotted path."""
        package, *rest = path.split(".")
        found: Any = self._packages[package]
        for name in rest:
            found = found[name]
        return found.final_target if found.is_alias else found

    def python_page(self) -> str:
        """Return the page about functions and classes."""
        parts = ["# Python API\n"]
        for module, (introduction, names) in MODULES.items():
            parts += [heading(2, f"`{module}`", anchor=module), f"{introduction}\n"]
            for name in names.split():
                parts += self._described(self.find(f"{module}.{name}"), name, f"{module}.{name}")
        return "\n".join(parts)

    def losses_page(self, registries: dict[str, Any]) -> str:
        """Return the page about losses and their parameters.

        Args:
            registries: registries of losses, by the title under which they are shown; a loss is shown once.
        """
        parts = [_LOSSES]
        seen: set[str] = set()
        for title, registry in registries.items():
            parts.append(f"## {title}\n")
            for name, entry in registry.entries.items():
                if entry.home in seen:
                    continue
                seen.add(entry.home)
                kind = self.find(entry.home.replace(":", "."))
                parts += [heading(3, f"`{name}`", anchor=f"loss.{name}"), *_sections(kind, f"loss.{name}")]
        return "\n".join(parts)

    def _described(self, found: Any, name: str, anchor: str) -> list[str]:
        """Return the section of a function or class."""
        kind = "class " if found.is_class else ""
        parts = [heading(3, f"`{name}`", anchor), f"```python\n{kind}{_signature(found, name)}\n```\n"]
        parts += _sections(found, anchor)
        if found.is_class:
            for member in _members(found):
                term = f"`.{member.name}{_short(member)}`"
                parts.append(definition(term, "\n\n".join(_sections(member, "")), f"{anchor}.{member.name}"))
        return parts


def _members(found: Any) -> list[Any]:
    """Return the public methods and properties of a class that have a docstring, in the order of its source."""
    own = [member for name, member in found.members.items() if not name.startswith("_") and not member.is_alias]
    return [one for one in own if one.docstring is not None and (one.is_function or "property" in one.labels)]


def _parameters(found: Any) -> list[Any]:
    if found.is_class and "__init__" not in found.all_members and "dataclass" not in found.labels:
        return []
    if not (found.is_function or found.is_class):
        return []
    return [parameter for parameter in found.parameters if parameter.name not in ("self", "cls")]


def _short(found: Any) -> str:
    """Return a method's arguments by name alone; nothing for a property."""
    if not found.is_function:
        return ""
    return f"({', '.join(parameter.name for parameter in _parameters(found))})"


def _signature(found: Any, name: str) -> str:
    """Return a signature, one parameter a line."""
    lines = []
    keywords = False
    for parameter in _parameters(found):
        prefix = {"variadic positional": "*", "variadic keyword": "**"}.get(parameter.kind.value, "")
        keywords = keywords or prefix == "*"
        if parameter.kind.value == "keyword-only" and not keywords:
            lines.append("    *,")
            keywords = True
        text = prefix + parameter.name
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and not prefix:
            text += f" = {parameter.default}" if parameter.annotation is not None else f"={parameter.default}"
        lines.append(f"    {text},")
    returns = f" -> {found.returns}" if found.is_function and found.returns is not None else ""
    inside = "\n".join(["", *lines, ""]) if lines else ""
    return f"{name}({inside}){returns}" if inside or found.is_function else name


def _sections(found: Any, anchor: str) -> list[str]:
    """Return a docstring's sections as Markdown."""
    if found.docstring is None:
        return []
    named = [one for one in _parameters(found) if not one.kind.value.startswith("variadic")]
    defaults = {one.name: one.default for one in named if one.default is not None}
    parts = []
    for section in found.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            parts.append(f"{markdown(section.value)}\n")
        elif kind in ("parameters", "other parameters", "attributes"):
            parts += [] if kind == "parameters" else ["Attributes:\n"]
            for item in section.value:
                default = f" Default `{defaults[item.name]}`." if item.name in defaults else ""
                term = f"`{item.name}`"
                parts.append(definition(term, markdown(item.description) + default, anchor and f"{anchor}.{item.name}"))
        elif kind in ("returns", "yields"):
            text = "\n".join(markdown(_returned(item)) for item in section.value)
            parts.append(definition(kind.capitalize(), text))
        elif kind == "raises":
            parts += [definition(f"Raises `{item.annotation}`", markdown(item.description)) for item in section.value]
        else:
            value = getattr(section.value, "contents", section.value)
            parts.append(f"{section.title or kind.capitalize()}: {markdown(str(value))}\n")
    return parts


def _returned(item: Any) -> str:
    return f"`{item.name}`: {item.description}" if item.name else item.description


def markdown(text: str) -> str:
    """Return a docstring's text as Markdown: roles become code, and signs that Markdown or HTML reads are escaped."""
    text = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    text = re.sub(r"::\n\n(?= )", ":\n\n", text)
    pieces = _CODE.split(text)
    for number in range(0, len(pieces), 2):
        pieces[number] = re.sub(r"<(?=\w)", "&lt;", pieces[number]).replace("*", "\\*")
    return "".join(pieces)
