"""Options models: a dataclass describes each option of a command once, for ``vlm-distill`` and for ``python -m``.

A field is an option as typer writes one: ``limit: Annotated[int | None, typer.Option(min=1, help="…")] = None``.
Checks that concern several options go into the dataclass's ``__post_init__``, which raises ``UserError``.

    @app.command()          # vlm-distill
    @expanded
    def cache(run: RunOptions, nproc: Processes = None) -> None:
        raise typer.Exit(launch("vlm_distill.cache", words_of(run), process_count(nproc)))

    options = parse(RunOptions, words, "vlm_distill.cache")     # python -m vlm_distill.cache
"""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
import yaml
from typer.models import ArgumentInfo

from data.errors import UserError

Options = TypeVar("Options")

#: What click raises for any wrong use of options; typer names only this subclass.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

Processes = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Processes on this machine; default: one per GPU, 1 on a CPU.")
]
#: For apps: -h is --help, of every command.
SETTINGS = {"help_option_names": ["-h", "--help"]}


@dataclass(kw_only=True)
class RunOptions:
    """The configuration of a run: its file and overrides."""

    config: Annotated[
        Path, typer.Argument(help="YAML file of the run; `vlm-distill configs` has examples.", show_default=False)
    ]
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, as in training.steps=100 or loss.0.weight=0.5.", show_default=False),
    ] = None


def expanded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with its first parameter, an options model, replaced by one parameter for each field.

    Further parameters of ``function`` stay: they are options of this command alone.
    """
    hints = get_type_hints(function, include_extras=True)
    first, *others = inspect.signature(function).parameters.values()
    model = hints[first.name]
    names = [field.name for field in fields(model)]

    def command(**values: Any) -> Any:
        options = model(**{name: values.pop(name) for name in names})
        return function(options, **values)

    annotations = {**get_type_hints(model, include_extras=True), **hints}
    parameters = [
        inspect.Parameter(field.name, first.KEYWORD_ONLY, default=_default(field), annotation=annotations[field.name])
        for field in fields(model)
    ]
    parameters += [other.replace(kind=first.KEYWORD_ONLY, annotation=annotations[other.name]) for other in others]
    command.__name__ = function.__name__
    # One line a paragraph: rich wraps them to the terminal.
    paragraphs = (function.__doc__ or "").split("\n\n")
    command.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def parse(
    model: type[Options], words: Sequence[str], program: str | None = None, description: str | None = None
) -> Options:
    """Return the options that the command line of ``python -m program`` gives.

    Args:
        model: the options model.
        words: the command line, without the program.
        program: the module's name, for ``--help``; by default that of the module that was started.
        description: text for ``--help``.

    Raises:
        UserError: one line about the first wrong option.
        SystemExit: after ``--help``.
    """
    given = [word for word in words if not word.startswith("--local_rank")]  # DeepSpeed's launcher adds it

    def options(found: Any) -> Any:
        return found

    options.__annotations__["found"] = model
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=SETTINGS)
    app.command(help=description)(expanded(options))
    found = run_app(app, given, program and f"python -m {program}")
    if not isinstance(found, model):
        sys.exit(found)
    return found


def run_app(app: typer.Typer, words: Sequence[str] | None = None, program: str | None = None) -> Any:
    """Run a command line; return what its command returns, or the exit code with which it ends.

    Args:
        app: the commands.
        words: the command line; by default that of this process.
        program: the name for ``--help``; by default that of the module that was started.

    Raises:
        UserError: one line about the first wrong option.
    """
    try:
        return typer.main.get_command(app).main(words, program, standalone_mode=False)
    except _UsageError as mistake:
        override = _override_as_option(mistake, sys.argv[1:] if words is None else words)
        if override is not None:
            raise UserError(override) from None
        text = mistake.format_message().replace("Value error, ", "")  # type: ignore[attr-defined]
        raise UserError(f"{text} (--help lists the options)") from None


def _override_as_option(mistake: Any, words: Sequence[str]) -> str | None:
    """Return how to write an override that was given as an option, as ``--training.steps 5``; else ``None``."""
    option, context = getattr(mistake, "option_name", ""), mistake.ctx
    if "." not in option or context is None:
        return None
    if not any(parameter.name in ("overrides", "words") for parameter in context.command.params):
        return None
    at = next(number for number, word in enumerate(words) if word.partition("=")[0] == option)
    _, sign, value = words[at].partition("=")
    if not sign:
        following = [word for word in words[at + 1 : at + 2] if not word.startswith("--")]
        value = following[0] if following else "VALUE"
    right = shlex.quote(f"{option.lstrip('-')}={value}")
    return f"{option}: keys of the configuration are given without dashes; write {right}"


def words_of(options: Any, model: type[Any] | None = None) -> list[str]:
    """Return the command line from which :func:`parse` makes these options again.

    Args:
        options: an options model with its values.
        model: the model that will parse the line; default: that of ``options``.
    """
    model = model or type(options)
    hints = get_type_hints(model, include_extras=True)
    positional: list[str] = []
    named: list[str] = []
    for field in fields(model):
        value = getattr(options, field.name)
        if value is None or value == _default(field):
            continue
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(one) if isinstance(one, dict) else str(one) for one in values]
        if isinstance(hints[field.name].__metadata__[0], ArgumentInfo):
            positional += texts
            continue
        flag = f"--{field.name.replace('_', '-')}"
        named += [flag] if value is True else [word for text in texts for word in (flag, text)]
    return positional + named


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def mapping(text: str) -> dict[str, Any]:
    """Parse an option whose value is a mapping in YAML, such as ``{enable_thinking: false}``."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise typer.BadParameter(f"{text!r} is not a mapping; write it as '{{name: value}}'")
    return value


def renaming(text: str) -> dict[str, str]:
    """Parse an option whose value is a mapping of names to names, such as ``{image: image_path}``."""
    value = mapping(text)
    for ours, theirs in value.items():
        if not isinstance(theirs, str):
            raise typer.BadParameter(f"{ours}: {theirs!r} is not a name; put it in quotes")
    return value


def video_sampling(text: str) -> dict[str, Any]:
    """Parse how files of videos are read: a mapping with the keys of ``data.video``."""
    from pydantic import ValidationError

    from vlm_distill.config.file import explain
    from vlm_distill.config.sections import VideoSection

    value = mapping(text)
    try:
        VideoSection.model_validate(value)
    except ValidationError as error:
        raise typer.BadParameter(explain(error, VideoSection)) from None
    return value


def positive_rate(text: str) -> float:
    """Parse an option whose value is a number of requests per minute."""
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None
    if not 0.001 <= value < float("inf"):
        raise typer.BadParameter(f"{text} is too small or too large: at least 0.001")
    return value
