"""Score a classifier on labelled images: ``python -m vision.evaluate MODEL --data DIR``.

The launchers of a training start it on several ranks; each rank takes its share of the images.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from data.batch import Problem
from data.errors import UserError
from vlm_distill.cli.options import parse
from vlm_distill.evaluation.left_out import too_much_left_out
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import cores, guarded, leave
from vlm_distill.runtime.rank_share import RankShare

from . import imagenet
from .predict import Inference, Labels, predict

if TYPE_CHECKING:
    from data.classification import LabelledImages

    from .classifier import Classifier


@dataclass(kw_only=True)
class EvaluateOptions:
    """A classifier, labelled images, and how to score one on the other."""

    model: Annotated[str, typer.Argument(help="Folder of a classifier, or timm's name of one.", show_default=False)]
    data: Annotated[Path, typer.Option(help="Folder or file of labelled images.", show_default=False)]
    set: Annotated[imagenet.Set | None, typer.Option(help="Which of ImageNet's sets the images are.")] = None
    format: Annotated[str, typer.Option(help="Format of the data; auto recognises it.")] = "auto"
    split: Annotated[str | None, typer.Option(help="Split of the data.")] = None
    source: Annotated[Literal["timm", "open_clip"], typer.Option(help="Library that the model's name is from.")] = (
        "timm"
    )
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Load the model's published weights, from its hub.")
    ] = False
    weights: Annotated[str | None, typer.Option(help="File of weights for the model.")] = None
    classes: Annotated[
        str | None, typer.Option(help="Names of the model's outputs: a file with one per line, or imagenet.")
    ] = None
    num_classes: Annotated[int | None, typer.Option(min=1, help="Number of the model's outputs.")] = None
    teacher: Annotated[str | None, typer.Option(help="Classifier to compare with: folder or timm's name.")] = None
    teacher_weights: Annotated[str | None, typer.Option(help="File of weights for the teacher.")] = None
    out: Annotated[Path | None, typer.Option(help="Folder for scores and predictions, such as RUN/evaluation.")] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask about this many images, evenly spaced (of ImageNet-C: per folder).")
    ] = None
    max_bad: Annotated[float, typer.Option(help="Largest share of images that may be left out, 0 to 1.")] = 0.5
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 256
    workers: Annotated[
        int | None, typer.Option(help="Processes that decode, of each rank; default: by cores, at most 8.")
    ] = None
    device: Annotated[str | None, typer.Option(help="Device; default: a GPU where there is one.")] = None

    def __post_init__(self) -> None:
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out: {self.out} is a file; give a folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Score what the options name; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: run(parse(EvaluateOptions, given, "vision.evaluate", __doc__)))


def run(options: EvaluateOptions) -> None:
    """Score the model, and the teacher if there is one; write and show the scores.

    Raises:
        UserError: model, data and options do not fit, or more images are left out than ``max_bad`` allows.
    """
    from vlm_distill.runtime.processes import Processes

    # Report mistakes before a model is loaded.
    _check_trained(options)
    parts = _open(options)
    processes = Processes()
    try:
        device = torch.device(options.device) if options.device else processes.device
        models = _models(options, device)
        workers = options.workers if options.workers is not None else min(8, cores() // processes.world)
        inference = Inference(options.batch_size, workers if workers > 1 else 0, device, device.type == "cuda")
        ranks = processes.share
        began = time.monotonic()
        found, skipped = _predict_all(options, parts, models, inference, ranks)
        if ranks.first:
            _report(options, parts[0][0].source.name, found, skipped, time.monotonic() - began)
    finally:
        processes.close()


#: A variant, and for ImageNet-C the corruption and severity.
_Part = tuple[imagenet.Variant, tuple[str, int] | None]


def _open(options: EvaluateOptions) -> list[_Part]:
    from data.classification import open_images

    def opened(path: Path) -> LabelledImages:
        return open_images(path, format=options.format, split=options.split)

    if options.set is None:
        return [(imagenet.Variant(opened(options.data)), None)]
    if options.set == "c":
        folders = imagenet.corruption_folders(options.data)
        return [(imagenet.open_variant("c", opened(path)), (name, severity)) for name, severity, path in folders]
    return [(imagenet.open_variant(options.set, opened(options.data)), None)]


def _check_trained(options: EvaluateOptions) -> None:
    """Raise ``UserError`` for an architecture without trained weights, whose scores would be meaningless."""
    import timm

    models = [
        (options.model, options.weights, "--weights"),
        (options.teacher, options.teacher_weights, "--teacher-weights"),
    ]
    for name, weights, option in models:
        if name is None or weights or options.pretrained or Path(name.removeprefix("local-dir:")).is_dir():
            continue
        if timm.is_model(name) or name.startswith(("hf-hub:", "hf_hub:")) or options.source == "open_clip":
            raise UserError(
                f"{name}: is a network without trained weights; give {option} FILE, or --pretrained for published ones"
            )


def _models(options: EvaluateOptions, device: torch.device) -> dict[str, Classifier]:
    """Load the models, the teacher first: the student is compared with its answers."""
    from .classifier import load_classifier

    models = {}
    if options.teacher:
        models["teacher"] = load_classifier(
            options.teacher,
            pretrained=options.pretrained and not options.teacher_weights,
            weights=options.teacher_weights,
        )
    models["student"] = load_classifier(
        options.model,
        source=options.source,
        pretrained=options.pretrained and not options.weights,
        weights=options.weights,
        classes=options.classes,
        num_classes=options.num_classes,
    )
    return {who: model.to(device).eval() for who, model in models.items()}


def _predict_all(
    options: EvaluateOptions,
    parts: Sequence[_Part],
    models: Mapping[str, Classifier],
    inference: Inference,
    ranks: RankShare,
) -> tuple[dict[str, dict[Any, dict[str, Any]]], list[Problem]]:
    """Ask all models about all parts of the data.

    Returns:
        Scores by model and corruption (``None`` where there is one part), and the images that were left out.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    name = parts[0][0].source.name
    scores: dict[str, dict[Any, dict[str, Any]]] = {who: {} for who in models}
    skipped: list[Problem] = []
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=plain_console(stderr=True), transient=True, disable=not ranks.first) as bar:
        for variant, corruption in parts:
            theirs: dict[int, Tensor] | None = None
            for who, model in models.items():
                task = bar.add_task(" ".join(map(str, (f"{who}: {name}", *(corruption or ())))))

                def progress(done: int, whole: int, task: Any = task) -> None:
                    bar.update(task, completed=done, total=whole)

                found = predict(
                    model,
                    variant.source,
                    inference,
                    Labels(_label_map(variant.source, model, options.set), variant.only_mapped, variant.references),
                    limit=options.limit,
                    ranks=ranks,
                    keep_logits=who == "teacher",
                    teacher=theirs,
                    progress=progress,
                )
                bar.remove_task(task)
                scores[who][corruption] = found.scores
                if who == "teacher":
                    theirs = found.logits or None
                else:
                    skipped += found.problems
                if ranks.first and corruption is None and options.out is not None:
                    found.write(options.out / name / who)
                    found.write_gallery(options.out / name / "pictures")
    return scores, skipped


def _report(
    options: EvaluateOptions,
    name: str,
    found: Mapping[str, Mapping[Any, dict[str, Any]]],
    skipped: Sequence[Problem],
    seconds: float,
) -> None:
    """Write the scores over all corruptions, and print every model's."""
    results = {}
    for who, scores in found.items():
        results[who] = imagenet.corruption_scores(scores) if options.set == "c" else scores[None]
        if options.set == "c" and options.out:
            path = options.out / name / who / "scores.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results[who], indent=2, ensure_ascii=False) + "\n", "utf-8")
    if not results["student"]["n"]:
        first = _told(skipped[0]) if skipped else "there is none"
        raise UserError(f"{name}: no image could be read; the first: {first}")
    _show(name, results)
    images = sum(scores["n"] for scores in results.values())
    print(f"{images / max(1e-9, seconds):,.0f} images per second")
    if skipped:
        print(f"{len(skipped)} left out, the first: {_told(skipped[0])}")
    if options.out:
        print(options.out / name)
    mistakes = too_much_left_out(name, results["student"]["n"], skipped, options.max_bad, "images")
    if mistakes:
        raise UserError(mistakes[0])


def _told(problem: Problem) -> str:
    return f"{problem.source}, line {problem.line}: {problem.reason}"


def _label_map(source: LabelledImages, classifier: Classifier, variant: str | None) -> list[int] | None:
    """Return the classifier's output for each of the source's classes."""
    if variant is not None:
        return imagenet.outputs(source.classes, classifier.classes)
    from .classes import map_classes

    found = map_classes(classifier.classes, None, source.classes, student_outputs=classifier.num_classes)
    return None if found.labels is None else found.labels.tolist()


def _show(name: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    from rich.table import Table

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2%}"

    def plain(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    table = Table("model", "images", "top-1", "top-5", "NLL", "ECE", "agreement", "KL", title=name)
    for who, scores in results.items():
        numbers = [share(scores["exact"]), share(scores["top5"]), plain(scores["nll"]), plain(scores["ece"])]
        compared = [share(scores.get("agreement")), plain(scores.get("kl"))]
        table.add_row(who, f"{scores['n']:,}", *numbers, *compared)
    plain_console().print(table)
    if "corruptions" in results["student"]:
        table = Table("corruption", *map(str, range(1, 6)), "mean", title="top-1 by severity")
        for corruption, found in results["student"]["corruptions"].items():
            mean = results["student"]["by_type"][corruption]["exact"]
            table.add_row(corruption, *(share(found.get(str(s))) for s in range(1, 6)), share(mean))
        plain_console().print(table)
        mce = results["student"]["mce"]
        print("mCE needs all 15 corruptions at five severities" if mce is None else f"mCE {mce:.1f} (AlexNet: 100)")


if __name__ == "__main__":
    leave(main())
