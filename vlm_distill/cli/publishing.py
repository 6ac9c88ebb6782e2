"""Commands around results and what there is: demo, export, report, configs, schema, losses, benchmarks, models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Column, Table

from data.errors import UserError
from vlm_distill.losses.plugins import Plugins
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.gpus import visible_gpus
from vlm_distill.runtime.launch import launch

from .options import expanded


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's runs and report.")] = Path("runs/demo"),
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes; default: 2, or 1 if there is one GPU.")] = None,
) -> None:
    """Distil, score, export and report on embedded data. Takes about four minutes on two cores."""
    from vlm_distill.demo import run

    run(out, nproc or min(2, len(visible_gpus())) or 2)


@dataclass(kw_only=True)
class ExportOptions:
    """Which run to export, as what, and where to upload it."""

    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)]
    folder: Annotated[Path, typer.Argument(help="Folder to write the student to.", show_default=False)]
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: as trained.")] = None
    format: Annotated[str, typer.Option(help="native; or llava, to write an assembled student as a LLaVA model.")] = (
        "native"
    )
    onnx: Annotated[bool, typer.Option("--onnx", help="For a classifier: also write model.onnx and check it.")] = False
    push_to_hub: Annotated[str | None, typer.Option(help="Also upload it, as owner/name; private.")] = None
    public: Annotated[bool, typer.Option("--public", help="Make the upload public.")] = False
    license: Annotated[str | None, typer.Option(help="Licence in the model card, as the hub names it: apache-2.0.")] = (
        None
    )
    evaluations: Annotated[
        list[Path],
        typer.Option(
            help="Folder of an evaluation of this student for the model card; may be repeated.", show_default=False
        ),
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.public and self.push_to_hub is None:
            raise UserError("export: --public needs an upload; add --push-to-hub owner/name")


@expanded
def export(options: ExportOptions) -> None:
    """Write a run's student, finished or at its latest checkpoint, as a folder with a model card.

    The documentation's page on export says what can load it. A classifier's run must be finished; its folder is one
    that timm reads.
    """
    from vlm_distill.export import check_hub, export_student, is_classifier, push
    from vlm_distill.reporting.card import Publication

    from .smoke import refuse_smoke

    refuse_smoke(options.run)
    if options.push_to_hub is not None:
        check_hub(options.push_to_hub)
    if is_classifier(options.run):
        _export_classifier(options)
    elif options.onnx:
        raise UserError(
            f"export: {options.run} is not a classifier's run, and only those are written as ONNX; leave --onnx out"
        )
    else:
        publication = Publication(options.license, options.push_to_hub, options.evaluations)
        print(export_student(options.run, options.folder, options.dtype, options.format, publication))
    if options.push_to_hub is not None:
        print(push(options.folder, options.push_to_hub, options.public))


def _export_classifier(options: ExportOptions) -> None:
    if options.dtype is not None or options.format != "native":
        raise UserError("export: a classifier is written as it was trained, in fp32; leave --dtype, --format out")
    words = [str(options.run), str(options.folder), *(["--onnx"] if options.onnx else [])]
    for name, value in (("--license", options.license), ("--hub", options.push_to_hub)):
        words += [] if value is None else [name, value]
    for folder in options.evaluations:
        words += ["--evaluations", str(folder)]
    code = launch("vision.export", words, 1)
    if code:
        raise typer.Exit(code)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs or evaluations to show side by side, or a sweep's.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: report.html in the first run.")] = None,
) -> None:
    """Write one self-contained HTML page about runs and evaluations, or about a sweep.

    Runs that differ only by their seed are shown as one training. A sweep's folder also gets its CSV and LaTeX.
    """
    from vlm_distill.reporting.report import write_report
    from vlm_distill.sweeping.record import is_sweep, read_record

    if len(runs) == 1 and is_sweep(runs[0]):
        from vlm_distill.sweeping.page import write_sweep

        print(write_sweep(read_record(runs[0]), out))
        return
    print(write_report(runs, out))


def losses() -> None:
    """List the losses, those of installed plug-ins included."""
    from vlm_distill.losses import PLUGINS, available

    _print_table("Losses", available())
    _warn_of_clashes(PLUGINS)


def benchmarks() -> None:
    """List the benchmarks, those of installed plug-ins included; the documentation has a page on evaluation."""
    from vlm_distill.evaluation.benchmark_lookup import PLUGINS, available

    _print_table("Benchmarks", available())
    _warn_of_clashes(PLUGINS)


def models() -> None:
    """List the kinds of models that a configuration can name; the documentation's page on models describes them."""
    from vlm_distill.models.families import PLUGINS

    for title, entries in _MODELS.items():
        _print_table(title, entries)
    if PLUGINS.names():
        _print_table("Families of plug-ins, by model type", PLUGINS.names())
    _warn_of_clashes(PLUGINS)


_MODELS = {
    "Whole models: student.path, teacher.path": {
        "a folder": "exported by this suite",
        "a Transformers name or folder": "an image-text-to-text model or a causal language model",
    },
    "Vision encoders: vision_encoder.source": {
        "timm": "any timm architecture: transformers and convolutional networks",
        "open_clip": "the visual tower of an open_clip model",
        "transformers": "CLIP, SigLIP and DINO towers, and other vision models",
    },
    "Projectors: projector.type": {
        "linear": "one linear layer",
        "mlp": "linear layers with GELU between them (LLaVA-1.5's has two)",
        "pixel_shuffle_mlp": "squares of neighbouring patches merged into one token (InternVL)",
        "resampler": "learned queries that attend to the patches (Perceiver)",
        "teacher": "the teacher's own, frozen, and an MLP to the student's width (CompoDistill)",
    },
    "Decoders: decoder.name or decoder.config": {
        "a name or folder": "any causal language model of Transformers",
        "config": "a new one, by its model_type",
    },
    "Students cut from the teacher: student.from_teacher": {
        "layers, by": "layers to keep: how many by which rule, or which",
        "neurons, heads, width": "sizes inside the layers, by activation on the run's data",
        "vision_encoder": "the same for the vision encoder",
    },
}


def configs(
    name: Annotated[
        str | None, typer.Argument(help="A configuration to print, or a folder of them to list; by default all.")
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(help="Folder to copy to, such as configs; or a file such as my.yaml.")
    ] = None,
) -> None:
    """List the configurations that ship; print one; or copy it, with the files that it builds on.

    A file that is there already is never overwritten.
    """
    from vlm_distill.config import shipped

    found = shipped.names() if name is None else shipped.matching(name)
    if destination is not None:
        _copy_configs(found, destination)
    elif len(found) == 1 and name is not None:
        print(shipped.text_of(found[0]), end="")
        others = [str(path) for path in shipped.needed_by(found[0])[1:] if path.suffix == ".yaml"]
        if others:
            print(
                f"it builds on {', '.join(others)}: `vlm-distill configs {found[0]} configs` copies all of them",
                file=sys.stderr,
            )
    else:
        for command in ("train", "classify", "sweep", "eval"):
            entries = {one: shipped.about(one) for one in found if shipped.command_of(one) == command}
            if entries:
                _print_table(f"For vlm-distill {command}", entries)


def schema(
    command: Annotated[
        Literal["train", "classify", "sweep", "eval"],
        typer.Argument(help="Command whose files to describe; for eval, benchmark files."),
    ] = "train",
) -> None:
    """Print the JSON schema of a configuration's file: every key with its description, type and default.

    An editor with a YAML language server then completes and checks keys in a file whose first line is
    "# yaml-language-server: $schema=FILE".
    """
    from vlm_distill.config.kinds import classifier_kind
    from vlm_distill.config.schema import json_schema
    from vlm_distill.config.sections import RunConfig
    from vlm_distill.losses import REGISTRY
    from vlm_distill.sweeping.sections import SweepSection

    if command == "train":
        found = json_schema(RunConfig, REGISTRY)
    elif command == "sweep":
        found = json_schema(SweepSection)
    elif command == "eval":
        from vlm_distill.evaluation.benchmark_entry import Benchmark

        found = json_schema(Benchmark)
        found["required"].remove("name")  # by default the file's
    else:
        # By name: nothing in vlm_distill depends on vision.
        found = json_schema(classifier_kind(), import_module("vision.losses").REGISTRY)
    print(json.dumps(found, indent=1, ensure_ascii=False))


def _copy_configs(found: Sequence[str], destination: Path) -> None:
    from vlm_distill.config import shipped

    if len(found) > 1 and destination.suffix in (".yaml", ".yml"):
        raise UserError(f"configs: {len(found)} configurations do not go into one file; name a folder")
    copied: dict[Path, None] = {}
    for one in found:
        copied |= dict.fromkeys(shipped.copy(one, destination))
    for path in copied:
        print(path)


def _warn_of_clashes(plugins: Plugins) -> None:
    """Name the installed plug-ins whose names are taken."""
    for clash in plugins.clashes():
        print(f"warning: {clash}", file=sys.stderr)


def _print_table(title: str, entries: dict[str, str]) -> None:
    table = Table(Column("name", no_wrap=True), "what it is", title=title, title_justify="left")
    for name, what in entries.items():
        table.add_row(name, what)
    plain_console().print(table)
