"""Text of a sweep: ``key=a,b,c`` of the command line, and values as overrides of a run."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from data.errors import UserError
from vlm_distill.config.file import parse_override

_OPEN, _CLOSE = "[{(", "]})"


def read_word(word: str) -> tuple[str, list[Any]]:
    """Return the dotted key of ``key=a,b,c`` and its values; one without a comma has one value.

    Commas inside brackets and quotes do not separate: ``loss=[{name: kd}, {name: ctkd}]`` is one value.

    Raises:
        UserError: the word has no ``=``, or a value is not readable.
    """
    key, sign, text = word.partition("=")
    if not sign or not key:
        raise UserError(f"sweep: {word[:200]!r}: write it as section.key=value, or section.key=a,b,c to compare values")
    values = [parse_override(f"{key}={part.strip()}")[1] for part in _parts(text)]
    return parse_override(f"{key}=0")[0], values


def _parts(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def override(key: str, value: Any) -> str:
    """Return ``key=value`` such that a run's command line reads the same value again."""
    return f"{key}={text_of(value)}"


def text_of(value: Any) -> str:
    """Return a value as one line of YAML: text that means itself without quotes, everything else as JSON."""
    if isinstance(value, str) and "\n" not in value and _means_itself(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _means_itself(text: str) -> bool:
    try:
        return bool(yaml.safe_load(text) == text and not re.fullmatch(r"[-+.\d_]+(e[-+]?\d+)?", text, re.IGNORECASE))
    except yaml.YAMLError:
        return False


def label(value: Any) -> str:
    """Return a value's name in a setting, possible in a folder's name; a loss's is that of its terms."""
    terms = value if isinstance(value, list) else [value]
    if terms and all(isinstance(term, dict) and "name" in term for term in terms):
        return safe("+".join(str(term["name"]) for term in terms))
    return safe(text_of(value))


def safe(name: str) -> str:
    """Return a name with everything that a shell or a file system may mistake replaced by ``_``."""
    return re.sub(r"[^\w.+=,-]+", "_", name).strip("_") or "_"
