"""Reference page of commands: every argument and option, from the models in ``vlm_distill/cli`` and ``vision``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from keys import in_words
from markdown_parts import definition, heading
from typer.models import ArgumentInfo

from vision.evaluate import EvaluateOptions
from vlm_distill.cli import app
from vlm_distill.cli.options import expanded

_INTRODUCTION = """# Commands

`vlm-distill COMMAND --help` shows the same. Every mistake is one line and exit code 2. Commands that start a run on
several processes have `--nproc`; [when to use another launcher](../first_pair.md#launchers).
"""


def commands_page() -> str:
    """Return the page about all commands."""
    parts = [_INTRODUCTION]
    for registered in app.registered_commands:
        function = registered.callback
        assert function is not None
        name = registered.name or function.__name__
        parts += _command(f"vlm-distill {name}", function, anchor=name)

    def classifier(options: EvaluateOptions) -> None:
        """Score a classifier, and write its scores."""

    classifier.__annotations__["options"] = EvaluateOptions
    parts += _command("python -m vision.evaluate", expanded(classifier), anchor="vision.evaluate")
    return "\n".join(parts)


def _command(words: str, function: Callable[..., Any], anchor: str) -> list[str]:
    """Return a command's section: usage, what it does, arguments and options."""
    hints = get_type_hints(function, include_extras=True)
    arguments, options, entries = [], [], []
    for parameter in inspect.signature(function).parameters.values():
        kind, info = get_args(hints[parameter.name])
        required = parameter.default is parameter.empty
        if isinstance(info, ArgumentInfo):
            term = parameter.name.upper()
            usage = f"{term}..." if "list[" in str(kind) else term
            arguments.append(usage if required else f"[{usage}]")
        else:
            flags = [word for word in info.param_decls or () if word.startswith("--")]
            term = flags[0] if flags else f"--{parameter.name.replace('_', '-')}"
            options.append(term)
        facts = _facts(kind, info, parameter.default)
        text = f"{facts}. {_plain(info.help or '')}"
        entries.append(definition(f"`{term}`", text, anchor=f"{anchor}.{parameter.name}"))
    usage = " ".join([words, *arguments, *(["[OPTIONS]"] if options else [])])
    about = _plain(inspect.getdoc(function) or "")
    return [heading(2, f"`{words}`", anchor), f"```\n{usage}\n```\n", f"{about}\n", *entries]


def _facts(kind: Any, info: Any, default: Any) -> str:
    """Return what a parameter takes, and its default."""
    if kind is bool:
        return "Switch"
    of_list = "list[" in str(kind)
    plain = in_words(kind, [info], {}).removeprefix("list of ")
    facts = [info.metavar.lower() if info.metavar else plain]
    if of_list:
        facts.append("several are allowed")
    if default is inspect.Parameter.empty:
        facts.append("**required**")
    elif default not in (None, [], ""):
        facts.append(f"default `{default}`")
    text = "; ".join(facts)
    return text[:1].upper() + text[1:]


def _plain(text: str) -> str:
    """Return help as Markdown; the pages that it names become links."""
    return re.sub(r"docs/(\w+)\.md", r"[\1](../\1.md)", text)
