"""Scores of a classifier on labelled images, on any number of ranks: ``python -m vision.evaluate MODEL --data DIR``.

The launchers start it on several processes as they start training; each answers its share of the images.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from data.batch import Problem
from data.errors import UserError
from vlm_distill.evaluation.left_out import too_much_left_out
from vlm_distill.runtime.console import plain_console
from vlm_distill.runtime.launch import cores, guarded, leave

from . import imagenet
from .predict import in_words, predict

if TYPE_CHECKING:
    from data.classification import LabelledImages

    from .classifier import Classifier


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores what the options name; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="vision.evaluate", description=__doc__)
    parser.add_argument("model", help="folder of a classifier, or timm's name of one")
    parser.add_argument("--data", type=Path, required=True, help="folder or file of labelled images")
    parser.add_argument("--set", choices=get_args(imagenet.Set), help="which of ImageNet's sets they are")
    parser.add_argument("--format", default="auto", help="of the data; default: as they look")
    parser.add_argument("--split", help="of the data")
    parser.add_argument(
        "--source", choices=["timm", "open_clip"], default="timm", help="where the model's name is from"
    )
    parser.add_argument("--pretrained", action="store_true", help="the model's published weights, from its hub")
    parser.add_argument("--weights", help="file of weights for the model")
    parser.add_argument("--classes", help="names of the model's outputs: a file of one a line, or imagenet")
    parser.add_argument("--num-classes", type=int, help="number of the model's outputs")
    parser.add_argument("--teacher", help="a classifier to agree with: folder or timm's name")
    parser.add_argument("--teacher-weights", help="file of weights for the teacher")
    parser.add_argument("--out", type=Path, help="folder for scores and predictions, such as RUN/evaluation")
    parser.add_argument("--limit", type=int, help="this many images, evenly spaced (of ImageNet-C: of each folder)")
    parser.add_argument("--max-bad", type=float, default=0.5, help="most of the images to leave out, 0 to 1")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, help="processes that decode, of each rank; default: by cores, at most 8")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    options = parser.parse_args(given)
    return guarded(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """The model, and the teacher if there is one, on the data; scores are written and shown."""
    from vlm_distill.runtime.processes import Processes

    for name in ("limit", "batch_size", "num_classes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(options, name)} is less than 1")
    # Mistakes are reported before a model is loaded.
    if options.out and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: {options.out} is a file; give a folder")
    _check_trained(options)
    parts = _open(options)
    processes = Processes()
    try:
        device = torch.device(options.device) if options.device else processes.device
        models = _models(options, device)
        workers = options.workers if options.workers is not None else min(8, cores() // processes.world)
        settings = {
            "batch_size": options.batch_size,
            "workers": workers if workers > 1 else 0,
            "device": device,
            "channels_last": device.type == "cuda",
            "limit": options.limit,
            "rank": processes.rank,
            "world": processes.world,
            "all_gather": processes.gather,
        }
        _score(options, parts, models, settings)
    finally:
        processes.close()


__all__ = ["in_words", "main", "predict", "run"]

#: A variant, and of ImageNet-C the corruption and severity.
_Part = tuple[imagenet.Variant, tuple[str, int] | None]


def _open(options: argparse.Namespace) -> list[_Part]:
    from data.classification import open_images

    def opened(path: Path) -> LabelledImages:
        return open_images(path, format=options.format, split=options.split)

    if options.set is None:
        return [(imagenet.Variant(opened(options.data)), None)]
    if options.set == "c":
        folders = imagenet.corruption_folders(options.data)
        return [(imagenet.open_variant("c", opened(path)), (name, severity)) for name, severity, path in folders]
    return [(imagenet.open_variant(options.set, opened(options.data)), None)]


def _check_trained(options: argparse.Namespace) -> None:
    """Raise ``UserError`` for the name of an architecture without weights: its scores would be of random numbers."""
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


def _models(options: argparse.Namespace, device: torch.device) -> dict[str, Classifier]:
    """The teacher first: the student is compared with its answers."""
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


def _score(
    options: argparse.Namespace,
    parts: Sequence[_Part],
    models: Mapping[str, Classifier],
    settings: Mapping[str, Any],
) -> None:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    first = settings["rank"] == 0
    name = parts[0][0].source.name
    found: dict[str, dict[Any, dict[str, Any]]] = {who: {} for who in models}
    skipped: list[Problem] = []
    began = time.monotonic()
    name_column = TextColumn("{task.description}", markup=False)
    columns = (name_column, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=plain_console(stderr=True), transient=True, disable=not first) as bar:
        for variant, corruption in parts:
            logits: dict[int, Tensor] = {}
            for who, model in models.items():
                task = bar.add_task(" ".join(map(str, (f"{who}: {name}", *(corruption or ())))))

                def progress(done: int, whole: int, task: Any = task) -> None:
                    bar.update(task, completed=done, total=whole)

                folder = options.out and options.out / name
                alone = corruption is None and folder is not None
                found[who][corruption] = predict(
                    model,
                    variant.source,
                    label_map=_label_map(variant.source, model, options.set),
                    only_mapped=variant.only_mapped,
                    references=variant.references,
                    logits=logits if who == "teacher" else None,
                    teacher=logits if who == "student" and logits else None,
                    out=folder / who if alone else None,
                    pictures=folder / "pictures" if alone else None,
                    skipped=skipped if who == "student" else None,
                    progress=progress,
                    **settings,
                )
                bar.remove_task(task)
    if not first:
        return
    results = {}
    for who, scores in found.items():
        results[who] = imagenet.corruption_scores(scores) if options.set == "c" else scores[None]
        if options.set == "c" and options.out:
            path = options.out / name / who / "scores.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results[who], indent=2, ensure_ascii=False) + "\n", "utf-8")
    if not results["student"]["n"]:
        raise UserError(
            f"{name}: no image could be read; the first: {_told(skipped[0]) if skipped else 'there is none'}"
        )
    _show(name, results)
    images = sum(scores["n"] for scores in results.values())
    print(f"{images / max(1e-9, time.monotonic() - began):,.0f} images per second")
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
    """The classifier's output of each of the source's classes."""
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
