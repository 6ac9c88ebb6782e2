"""Commands around results and what there is: demo, export, report, losses, models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from data.errors import UserError
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import launch

from .options import Processes, expanded


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's runs and report.")] = Path("runs/demo"),
    nproc: Processes = 2,
) -> None:
    """Distil, score, export and report on embedded data. Takes about four minutes on two cores."""
    from vlm_distill.demo import run

    run(out, nproc)


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

    def __post_init__(self) -> None:
        if self.public and self.push_to_hub is None:
            raise UserError("export: --public says how to upload; name what is uploaded by --push-to-hub")


@expanded
def export(options: ExportOptions) -> None:
    """Write a run's student, finished or at its latest checkpoint, as a folder with a model card.

    docs/export.md says what can load it. A classifier's run must be finished; its folder is one that timm reads.
    """
    from vlm_distill.export import check_hub, export_student, is_classifier, push

    if options.push_to_hub is not None:
        check_hub(options.push_to_hub)
    if is_classifier(options.run):
        _export_classifier(options)
    elif options.onnx:
        raise UserError(
            f"export: {options.run} is no classifier's run, and others are not written as ONNX; leave --onnx out"
        )
    else:
        print(export_student(options.run, options.folder, options.dtype, options.format))
    if options.push_to_hub is not None:
        print(push(options.folder, options.push_to_hub, options.public))


def _export_classifier(options: ExportOptions) -> None:
    if options.dtype is not None or options.format != "native":
        raise UserError("export: a classifier is written as it was trained, in fp32; leave --dtype, --format out")
    words = [str(options.run), str(options.folder)]
    code = launch("vision.export", [*words, "--onnx"] if options.onnx else words, 1)
    if code:
        raise typer.Exit(code)


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs to show side by side, or a sweep's.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: report.html in the first run.")] = None,
) -> None:
    """Write one self-contained HTML page about one or more runs, or about a sweep.

    Runs that differ by their seed alone are shown as one training. A sweep's folder also gets its CSV and LaTeX.
    """
    from vlm_distill.reporting.report import write_report
    from vlm_distill.sweeping.record import is_sweep, read_record

    if len(runs) == 1 and is_sweep(runs[0]):
        from vlm_distill.sweeping.page import write_sweep

        print(write_sweep(read_record(runs[0]), out))
        return
    print(write_report(runs, out))


def losses() -> None:
    """List the losses."""
    from vlm_distill.losses import available

    _print_table("Losses", available())


def models() -> None:
    """List the kinds of models that a configuration can name; docs/models.md describes them."""
    for title, entries in _MODELS.items():
        _print_table(title, entries)


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


def _print_table(title: str, entries: dict[str, str]) -> None:
    table = Table("name", "what it is", title=title, title_justify="left")
    for name, what in entries.items():
        table.add_row(name, what)
    plain_console().print(table)
