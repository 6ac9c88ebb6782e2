"""The command ``vlm-distill``. Each file beside this one holds a group of commands with their options."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vlm_distill.runtime.launch import guarded
from vlm_distill.version import __version__

from . import evaluation, publishing, training
from .options import SETTINGS, run_app

app = typer.Typer(
    name="vlm-distill",
    help="Distil a large vision-language model into a small one. Start with [bold]vlm-distill demo[/].",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
)


def main() -> None:
    """Run the command; a user's mistake becomes one line and exit code 2, never a traceback."""
    sys.exit(guarded(lambda: sys.exit(run_app(app))))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"vlm-distill {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.get_help()
        raise typer.Exit


# In the order of --help.
app.command()(publishing.demo)
app.command()(training.train)
app.command()(training.cache)
app.command()(training.classify)
app.command()(training.sweep)
app.command()(training.inspect)
app.command()(training.plan)
app.command()(training.generate)
app.command("eval")(evaluation.evaluate)
app.command()(evaluation.score)
app.command()(evaluation.compare)
app.command()(evaluation.ask)
app.command()(publishing.export)
app.command()(publishing.report)
app.command()(publishing.configs)
app.command()(publishing.schema)
app.command()(publishing.losses)
app.command()(publishing.benchmarks)
app.command()(publishing.models)
