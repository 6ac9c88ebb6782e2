"""Export a classifier: safetensors that timm loads, class names, a model card and optionally ONNX.

``python -m vision.export RUN FOLDER [--onnx]`` exports a run's student, or any folder that holds a classifier.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError, first_line
from vlm_distill.config.file import read_saved
from vlm_distill.export import finished_student
from vlm_distill.reporting.card import (
    FOLDER,
    Publication,
    cell,
    data_section,
    document,
    fact_table,
    licence_section,
    loss_section,
    pairs,
    score_section,
    use_section,
)
from vlm_distill.reporting.card_scores import CardScore, card_scores
from vlm_distill.runtime.launch import guarded

from .classifier import Classifier, load_classifier
from .losses import REGISTRY

#: Largest difference between ONNX and torch as a share of the largest logit; kernels add in other orders.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class About:
    """Facts for a model card beyond the model itself; unknown ones are left out.

    Attributes:
        name: the model's name.
        config: the configuration of the run that trained it, as plain data.
        scores: the scores to show.
        publication: licence and name on the hub.
    """

    name: str
    config: Mapping[str, Any] | None = None
    scores: Sequence[CardScore] = ()
    publication: Publication = field(default_factory=Publication)

    @property
    def teacher(self) -> str | None:
        """The teacher's name in the configuration."""
        return ((self.config or {}).get("teacher") or {}).get("name")


class FromPixels(nn.Module):
    """A classifier of RGB images in 0..1 that normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = classifier.model
        self.register_buffer("mean", torch.tensor(classifier.inputs.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(classifier.inputs.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def export(classifier: Classifier, folder: Path, about: About, onnx: bool = False) -> float | None:
    """Write ``model.safetensors``, ``config.json``, ``labels.txt``, ``README.md`` and optionally ``model.onnx``.

    Args:
        classifier: in float32 on the CPU; left in evaluation mode.
        folder: created if missing.
        about: for the model card.
        onnx: also write ONNX: RGB in 0..1, float32 ``[batch, 3, height, width]``, to logits ``[batch, classes]``.

    Returns:
        The largest difference between onnxruntime's and torch's logits; ``None`` without ONNX.

    Raises:
        UserError: ONNX's packages are not installed, or torch cannot export this model.
    """
    classifier.eval()
    classifier.save_pretrained(folder)
    if classifier.classes is not None:
        (folder / "labels.txt").write_text("\n".join(classifier.classes) + "\n", encoding="utf-8")
    difference = _write_onnx(classifier, folder / "model.onnx") if onnx else None
    (folder / "README.md").write_text(_card(classifier, folder, about, difference), encoding="utf-8")
    return difference


def _write_onnx(classifier: Classifier, path: Path) -> float:
    """Write ``model.onnx``, and return how far its logits are from torch's."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx: {error.name} is not installed; pip install 'vlm-distill[onnx]'") from error
    model = FromPixels(classifier).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, *classifier.inputs.size, generator=generator)
    try:
        torch.onnx.export(
            model,
            (images[:2],),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        onnx.save(_without_traces(onnx.load(str(path))), str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # torch and its converters raise anything for what they cannot express
        raise UserError(f"--onnx: this model cannot be written as ONNX: {first_line(error)}") from error
    difference = 0.0
    for count in (1, 3):  # neither equals the batch size at tracing
        with torch.no_grad():
            expected = model(images[:count])
        found = torch.from_numpy(session.run(None, {"images": images[:count].numpy()})[0])
        difference = max(difference, (found - expected).abs().max().item())
    if difference > TOLERANCE * max(1.0, expected.abs().max().item()):
        raise UserError(f"--onnx: its logits differ from torch's by up to {difference:.1e}; {path} is not to be used")
    return difference


def _without_traces(model: Any) -> Any:
    """Return an ONNX model without what the exporter wrote about its own code, which names files of this machine."""
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def export_run(run: Path, folder: Path, onnx: bool = False, publication: Publication | None = None) -> float | None:
    """Export the student of a run, or the classifier in a folder; see :func:`export`.

    Args:
        publication: what the model card says beyond the run: licence, name on the hub, further evaluations.

    Raises:
        UserError: the folder is neither a finished run nor a classifier, or holds no evaluation.
    """
    source = finished_student(run) or run
    if not (source / "config.json").is_file():
        raise UserError(f"{run}: neither a run with a finished student nor a classifier's folder")
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder}: is where the classifier comes from; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; an export is a folder")
    about = _about(run, publication or Publication())
    return export(load_classifier(str(source)), folder, about, onnx)


def _about(run: Path, publication: Publication) -> About:
    """Read the facts from a run's own files."""
    scores = card_scores(run, publication.evaluations)
    path = run / "config.yaml"
    # Not validated: a plug-in that the run used may be installed no more.
    config = read_saved(path) if path.is_file() else None
    return About(run.resolve().name, config, scores, publication)


def _card(classifier: Classifier, folder: Path, about: About, difference: float | None) -> str:
    """Return a model card in the hub's form: facts as YAML for machines, then in words."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = settings.get("architecture")
    metadata: dict[str, Any] = {
        "library_name": "timm" if architecture else None,
        "license": about.publication.licence,
        "base_model": _base_model(about.teacher),
        "tags": ["image-classification", "knowledge-distillation", "vlm-distill"],
    }
    lines = [f"# {cell(about.name)}", "", *_description(classifier, about, architecture), ""]
    commands = [f"python -m vision.evaluate {FOLDER} --data folder/of/images"]
    lines += use_section(_usage(classifier, settings), commands, about.publication)
    lines += score_section(about.scores)
    if about.config is not None:
        lines += loss_section(about.config["loss"], REGISTRY)
        lines += data_section(about.config)
    if difference is not None:
        lines += [
            "## ONNX",
            "",
            "`model.onnx` takes RGB images in 0..1 (`images`, float32, `[batch, 3, "
            f"{classifier.inputs.size[0]}, {classifier.inputs.size[1]}]`); mean and standard deviation are inside. "
            f"It gives `logits`. Against torch they differ by at most {difference:.1e}.",
            "",
        ]
    lines += licence_section(about.publication)
    return document(about.name, "image-classification", metadata, about.scores, "\n".join(lines))


def _base_model(teacher: str | None) -> str | None:
    """Return the teacher's name on the hub; ``None`` if it is a local folder."""
    if not teacher or Path(teacher).exists():
        return None
    return f"timm/{teacher}" if "." in teacher else teacher


def _description(classifier: Classifier, about: About, architecture: str | None) -> list[str]:
    inputs, training = classifier.inputs, about.config or {}
    size = sum(p.numel() for p in classifier.parameters())
    mean = ", ".join(f"{value:.4g}" for value in inputs.mean)
    std = ", ".join(f"{value:.4g}" for value in inputs.std)
    rows = [
        ("architecture", architecture or "an image tower of open_clip under a linear layer"),
        ("parameters", f"{size / 1e6:.2f} million"),
        ("classes", f"{classifier.num_classes}" + (", named in labels.txt" if classifier.classes else "")),
        ("images", f"{inputs.size[0]}×{inputs.size[1]}, {inputs.interpolation}, centre crop {inputs.crop_pct:g}"),
        ("normalisation", f"mean {mean}; standard deviation {std}"),
        ("teacher", about.teacher or ""),
        ("optimizer", pairs(training.get("optimizer"), "name", "lr", "schedule", "weight_decay")),
        ("training", pairs(training.get("training"), "epochs", "steps", "batch_size", "dtype", "seed")),
    ]
    return fact_table(rows)


def _usage(classifier: Classifier, settings: Mapping[str, Any]) -> list[str]:
    architecture = settings.get("architecture")
    if architecture is None:
        return [
            "from vision.classifier import load_classifier  # of vlm-distill",
            "",
            'classifier = load_classifier("path/to/this/folder").eval()',
        ]
    lines = ["import timm"]
    if architecture.startswith("cifar_") or architecture == "mobilenet_v1":
        lines.append("import vision.cifar  # of vlm-distill: registers the architecture with timm")
    unsaid = {"in_chans": 3, "global_pool": settings.get("global_pool")}
    options = {k: v for k, v in settings.get("model_args", {}).items() if v != unsaid.get(k, object())}
    options["num_classes"] = classifier.num_classes
    given = "".join(f", {k}={v!r}" for k, v in options.items())
    return [
        *lines,
        "",
        f'model = timm.create_model("{architecture}", checkpoint_path="model.safetensors"{given}).eval()',
        '# or, with its input settings: timm.create_model("local-dir:path/to/this/folder", pretrained=True)',
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vision.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, or one that holds a classifier")
    parser.add_argument("folder", type=Path, help="where the export goes")
    parser.add_argument("--onnx", action="store_true", help="write and check model.onnx as well")
    parser.add_argument("--license", help="licence in the model card, such as apache-2.0")
    parser.add_argument("--hub", help="name on the hub, for the model card")
    parser.add_argument("--evaluations", type=Path, action="append", default=[], help="further folders of scores")
    options = parser.parse_args(arguments)
    publication = Publication(options.license, options.hub, options.evaluations)

    def command() -> None:
        difference = export_run(options.run, options.folder, options.onnx, publication)
        if difference is not None:
            print(f"onnx: logits differ from torch's by at most {difference:.1e}")
        print(options.folder)

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main())
