"""The JSON schema of a configuration's file, for editors: from the models that read it, so that it cannot be outdated.

A file is a layer: it may leave out what its bases give, and may write ``${…}`` in place of any value. The schema allows
both. It knows the parameters of every loss and DeepSpeed's keys, but no rules between sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from vlm_distill.losses import PLUGINS, Registry

from .deepspeed_keys import AUTO, KNOWN
from .sections import DeepSpeedSection, LossSection

#: The dialect that editors know best.
DIALECT = "http://json-schema.org/draft-07/schema#"
_INTERPOLATION = {"description": "Another value, `${section.key}` or `${oc.env:NAME,default}`.", "pattern": r"\$\{"}
_ANNOTATIONS = ("description", "default")
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", list: "array", dict: "object"}


def json_schema(kind: type[BaseModel], losses: Registry[Any] | None = None) -> dict[str, Any]:
    """Return the schema of the files that a model reads.

    Args:
        kind: the model of the whole file.
        losses: those that a run's ``loss`` can name; ``None``: the files describe no run, and have no layers.
    """
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    if losses is not None:
        _give_losses(definitions, losses)
        _give_deepspeed_keys(definitions)
        _allow_layers(schema, definitions)
        definitions["interpolation"] = {"type": "string", **_INTERPOLATION}
    for node in _nodes([schema, definitions]):
        _in_dialect(node)
        if losses is not None:
            _allow_interpolations(node)
    title = schema.pop("description", "").partition("\n")[0]
    return {"$schema": DIALECT, "title": title, **schema, "definitions": definitions}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping of a schema, the inner ones last."""
    if isinstance(tree, list):
        for item in tree:
            yield from _nodes(item)
    elif isinstance(tree, dict):
        yield tree
        for value in list(tree.values()):
            yield from _nodes(value)


def _in_dialect(node: dict[str, Any]) -> None:
    """Write what pydantic writes for a newer dialect in the words of this one."""
    if isinstance(node.get("title"), str):
        del node["title"]  # a field's name in capitals
    if isinstance(node.get("prefixItems"), list):
        node["items"] = node.pop("prefixItems")
    if isinstance(node.get("$ref"), str):
        named = node.pop("$ref").replace("#/$defs/", "#/definitions/")
        # This dialect ignores what is beside a reference.
        node |= {"allOf": [{"$ref": named}]} if node else {"$ref": named}


# Losses and DeepSpeed


def _give_losses(definitions: dict[str, Any], losses: Registry[Any]) -> None:
    """Let terms have exactly the parameters of the loss that they name."""
    for name in _definitions_of(LossSection, definitions):
        term = definitions[name]
        common = dict.fromkeys([*term["properties"], "standardise"], True)
        term["properties"]["name"] = {
            "description": term["properties"]["name"]["description"],
            # A loss of one's own is named by its class, as package.module:Class.
            "anyOf": [{"enum": [*losses.entries, *PLUGINS.names()]}, {"type": "string", "pattern": ":"}],
        }
        term["allOf"] = [
            {
                "if": {"properties": {"name": {"const": loss}}, "required": ["name"]},
                "then": {
                    "description": entry.summary(),
                    "properties": {**common, **dict.fromkeys(entry.parameters, True)},
                    "additionalProperties": False,
                },
            }
            for loss, entry in losses.entries.items()
        ]


def _give_deepspeed_keys(definitions: dict[str, Any]) -> None:
    """Let the section ``deepspeed`` have the keys that DeepSpeed has."""
    for name in _definitions_of(DeepSpeedSection, definitions):
        section = definitions[name]
        section["properties"] |= {key: _of_deepspeed(kind) for key, kind in KNOWN.items()}
        section["additionalProperties"] = False


def _of_deepspeed(kind: Any) -> dict[str, Any]:
    """Return the schema of one of DeepSpeed's values, as ``deepspeed_keys`` describes it."""
    if isinstance(kind, dict):
        properties = {key: _of_deepspeed(inner) for key, inner in kind.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    if isinstance(kind, tuple):
        return {"enum": [*kind, AUTO]}
    if kind is object:
        return {}
    return {"anyOf": [{"type": _TYPES[kind]}, {"const": AUTO}]}


def _definitions_of(base: type[BaseModel], definitions: Mapping[str, Any]) -> list[str]:
    """Return the names of the definitions that are of a section or of one derived from it."""
    kinds = [base]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return [kind.__name__ for kind in kinds if kind.__name__ in definitions]


# Layers and interpolations


def _allow_layers(schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Let a file leave out what its bases may give, and name them."""
    # Lists are replaced whole, so that their entries are complete.
    items = [node.get("items") for node in _nodes([schema, definitions])]
    entries = {node.get("$ref") for node in _nodes(items)}
    for name, section in definitions.items():
        if f"#/$defs/{name}" not in entries:
            section.pop("required", None)
    schema.pop("required", None)
    schema["properties"]["base"] = {
        "description": "File that this one is merged onto, relative to it; or several, each merged onto those before.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    deepspeed = schema["properties"]["deepspeed"]
    file = {"type": "string", "description": "A JSON file for DeepSpeed, relative to this one."}
    described = {key: deepspeed.pop(key) for key in _ANNOTATIONS if key in deepspeed}
    schema["properties"]["deepspeed"] = {**described, "anyOf": [deepspeed, file]}


def _allow_interpolations(node: dict[str, Any]) -> None:
    """Let ``${…}`` take the place of numbers and choices below a node; text takes it anyway."""
    properties, items = node.get("properties"), node.get("items")
    if isinstance(properties, dict):
        node["properties"] = {name: _or_interpolation(value) for name, value in properties.items()}
    if isinstance(items, dict):
        node["items"] = _or_interpolation(items)
    elif isinstance(items, list):
        node["items"] = [_or_interpolation(value) for value in items]


def _or_interpolation(value: Any) -> Any:
    """Return the schema of a value, or of an interpolation in its place; sections and lists stay as they are."""
    if not isinstance(value, dict) or not any(_is_plain(one) for one in value.get("anyOf", [value])):
        return value
    outer = {key: value[key] for key in _ANNOTATIONS if key in value}
    rest = {key: inner for key, inner in value.items() if key not in _ANNOTATIONS}
    alternatives = rest["anyOf"] if [*rest] == ["anyOf"] else [rest]
    return {**outer, "anyOf": [*alternatives, {"$ref": "#/definitions/interpolation"}]}


def _is_plain(value: Mapping[str, Any]) -> bool:
    """Return whether a schema is that of a number, of true and false, or of one of several words."""
    return value.get("type") in ("integer", "number", "boolean") or "enum" in value
