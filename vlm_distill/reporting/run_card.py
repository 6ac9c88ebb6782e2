"""The model card of a run's student, a language or vision-language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.saved_json import read_object
from vlm_distill.losses.catalogue import REGISTRY

from .card import (
    FOLDER,
    Publication,
    cell,
    data_section,
    document,
    fact_table,
    hub_name,
    licence_section,
    loss_section,
    pairs,
    score_section,
    use_section,
)
from .card_scores import card_scores


@dataclass(frozen=True)
class CardRun:
    """What a card says of a run.

    Attributes:
        folder: the run's folder, which holds the scores and names the model.
        config: its configuration, as plain data.
        changes: changes to the configuration during the run, in words.
        rows: number of samples of each source; empty if unknown.
    """

    folder: Path
    config: Mapping[str, Any]
    changes: Sequence[str] = ()
    rows: Sequence[int] = ()


@dataclass(frozen=True)
class CardModel:
    """What a card says of a student.

    Attributes:
        sees: whether it takes images.
        size: number of parameters.
        library: what loads it: ``transformers`` or ``vlm-distill``.
        code: lines of Python that use it.
    """

    sees: bool
    size: int
    library: str
    code: Sequence[str]


def run_card(run: CardRun, model: CardModel, publication: Publication = Publication()) -> str:  # noqa: B008 - frozen
    """Return the model card of a run's student, a language or vision-language model.

    Raises:
        UserError: a folder of ``publication.evaluations`` holds no evaluation, or a file of scores is damaged.
    """
    task = "image-text-to-text" if model.sees else "text-generation"
    name = run.folder.resolve().name
    sources = run.config["data"]["train"]
    metadata: dict[str, Any] = {
        "library_name": model.library,
        "license": publication.licence,
        "base_model": _origins(run.config) or None,
        "datasets": list(dict.fromkeys(found for s in sources if (found := hub_name(s["path"])))) or None,
        "tags": ["knowledge-distillation", "vlm-distill"],
    }
    scores = card_scores(run.folder, publication.evaluations)
    code = model.code
    if publication.hub is not None and model.library == "transformers":
        code = [line.replace(FOLDER, publication.hub) for line in code]
    lines = [f"# {cell(name)}", "", "A student distilled by vlm-distill.", ""]
    lines += [*fact_table(_facts(run, model.size)), ""]
    lines += use_section(code, _commands(model.sees), publication)
    lines += score_section(scores)
    lines += loss_section(run.config["loss"], REGISTRY)
    lines += data_section(run.config, run.rows)
    lines += licence_section(publication)
    return document(name, task, metadata, scores, "\n".join(lines))


def _commands(sees: bool) -> list[str]:
    """Return commands that ask the student and score it."""
    picture, question = ("picture.png", "What is this?") if sees else ("-", "Hello")
    lines = [f'vlm-distill ask {FOLDER} {picture} "{question}"']
    if sees:
        lines.append(f"vlm-distill eval {FOLDER} --benchmarks mmstar --data folder/of/benchmarks")
    return lines


def _facts(run: CardRun, size: int) -> list[tuple[str, str]]:
    config, student = run.config, run.config["student"]
    return [
        ("parameters", f"{size / 1e6:.2f} million"),
        ("teacher", ", ".join(map(_whole, _teachers(config)))),
        ("student", _whole(student)),
        ("trained parts", ", ".join(student.get("train") or [])),
        ("LoRA", pairs(student.get("lora"), "rank", "alpha")),
        ("optimizer", pairs(config.get("optimizer"), "lr", "schedule", "warmup", "weight_decay", "max_grad_norm")),
        ("training", pairs(config.get("training"), "epochs", "steps", "batch_size", "dtype", "seed")),
        ("changed during training", "; ".join(run.changes)),
        ("ZeRO stage", str((config.get("deepspeed") or {}).get("stage", ""))),
        ("trained in", _hours(run.folder)),
    ]


def _hours(folder: Path) -> str:
    """Return how long a finished run took, on what, and with which versions."""
    path = folder / "summary.json"
    if not path.is_file():
        return ""
    summary = read_object(path, {"seconds": float, "ranks": int, "device": str, "versions": dict[str, str]})
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    hours = summary["seconds"] / 3600
    length = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    return f"{length} on {summary['ranks']} × {summary['device']}; {versions}"


def _origins(config: Mapping[str, Any]) -> list[str]:
    """Return the hub names of the teachers and of the models that the student's weights come from."""
    student = config["student"]
    encoder, decoder = student.get("vision_encoder") or {}, student.get("decoder") or {}
    names = [section.get("path") for section in [*_teachers(config), student]]
    names.append(decoder.get("name"))
    if encoder.get("pretrained") and encoder.get("source") == "transformers":
        names.append(encoder.get("name"))
    elif encoder.get("pretrained") and encoder.get("source") == "timm":
        names.append(f"timm/{encoder.get('name')}")
    return list(dict.fromkeys(found for name in names if (found := hub_name(name))))


def _teachers(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the sections of a run's teachers, one or several."""
    single = config.get("teacher")
    return [single] if single else list((config.get("teachers") or {}).values())


def _whole(model: Mapping[str, Any]) -> str:
    """Describe a model's section. Local folders are shown by their last name only."""
    if model.get("path"):
        return hub_name(model["path"]) or Path(model["path"]).name
    if model.get("from_student"):
        return "the student itself"
    if server := model.get("server"):
        return f"{server.get('model') or 'a model'} on a server"
    if cut := model.get("from_teacher"):
        return f"pruned from the teacher: {pairs(cut, *cut)}"
    parts = []
    for part in ("vision_encoder", "projector", "decoder"):
        if section := model.get(part):
            named = section.get("name") or section.get("type") or (section.get("config") or {}).get("model_type")
            parts.append(hub_name(named) or Path(str(named)).name)
    return " + ".join(parts)
