"""Fix a chat template's arguments, such as `enable_thinking`, as part of the template."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from data.errors import UserError

#: Names that every template is given anyway.
_OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


def with_arguments(template: Any, arguments: Mapping[str, Any], where: str) -> Any:
    """Return a chat template with these values as its arguments' defaults.

    They become part of the template, so they go wherever it goes: into cache identities and exported students.

    Args:
        template: a Jinja template, or several by name.
        arguments: values by name, as in ``student.template_arguments``.
        where: the section of the configuration, for errors.

    Raises:
        UserError: there is no template, or it does not read an argument.
    """
    if not arguments:
        return template
    if template is None:
        raise UserError(f"{where}: this model has no chat template; leave it out")
    if isinstance(template, dict):
        return {name: with_arguments(one, arguments, where) for name, one in template.items()}
    read = set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"{[{%].*?[%}]}", template, re.DOTALL))))
    defaults = ""
    for name, value in arguments.items():
        if name in _OWN_NAMES:
            raise UserError(f"{where}: '{name}' is what every chat template is given; leave it out")
        if name not in read:
            near = difflib.get_close_matches(name, read, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "leave it out"
            raise UserError(f"{where}: the chat template does not read '{name}'; {hint}")
        defaults += f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
    return defaults + template


def _literal(value: Any) -> str:
    """Write a YAML value as a Jinja literal."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
