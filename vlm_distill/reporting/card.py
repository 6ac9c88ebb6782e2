"""Model cards in the hub's format: facts as YAML front matter, then the same in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.errors import one_line
from data.saved_json import read_object


def document(facts: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Return a card: front matter for the hub, with the licence left to fill in, and the text."""
    front = yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True).strip()
    licence = "# license: yours to choose; mind those of the data and of every base model"
    return "\n".join(["---", front, licence, "---", "", *lines])


def hub_name(name: str | None) -> str | None:
    """Return ``name`` if it looks like ``owner/name`` on the hub and is not a local file or folder."""
    if name is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        return None
    return None if name.endswith((".json", ".jsonl", ".ndjson", ".parquet", ".arrow")) else name


def in_words(losses: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe the loss terms of a configuration, each with its weight and parameters."""
    words = []
    for term in losses:
        given = ", ".join(f"{k} {v}" for k, v in term.items() if k not in ("name", "weight"))
        words.append(f"{term.get('weight', 1.0)} × {term['name']}" + (f" ({given})" if given else ""))
    return words


def source_names(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of a run's data sources."""
    return [s.get("name") or hub_name(s["path"]) or Path(s["path"]).name for s in sources]


def student_scores(run: Path) -> dict[str, dict[str, Any]]:
    """Return the student's final ``scores.json`` by data name."""
    files = sorted(run.glob("evaluation/*/student/scores.json"))
    return {file.parent.parent.name: read_object(file) for file in files}


def fact_table(rows: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the lines of a table of facts, without empty ones."""
    return ["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows if value)]


def cell(value: Any) -> str:
    """Return a value as one line of plain text for a Markdown table, with any markup escaped."""
    return one_line(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def result(task: str, data: str, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an entry of ``model-index``."""
    return {"task": {"type": task}, "dataset": {"name": data, "type": data}, "metrics": list(metrics)}


def run_card(
    config: Mapping[str, Any],
    run: Path,
    sees: bool,
    size: int,
    library: str,
    usage: Sequence[str],
    changes: Sequence[str] = (),
) -> str:
    """Return the model card of a run's student, a language or vision-language model.

    Args:
        config: the run's configuration, as plain data.
        run: the run's folder, which holds the scores and names the model.
        sees: whether the student takes images.
        size: the student's number of parameters.
        library: what loads it: ``transformers`` or ``vlm-distill``.
        usage: lines of Python that use the model.
        changes: changes to the configuration during the run, in words.
    """
    task = "image-text-to-text" if sees else "text-generation"
    name = run.resolve().name
    facts: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["knowledge-distillation", "vlm-distill"],
    }
    sources = config["data"]["train"]
    if origins := _origins(config):
        facts["base_model"] = origins
    if datasets := list(dict.fromkeys(found for s in sources if (found := hub_name(s["path"])))):
        facts["datasets"] = datasets
    results, table = _scores(run, task)
    if results:
        facts["model-index"] = [{"name": name, "results": results}]
    lines = [f"# {cell(name)}", "", "A student distilled by vlm-distill.", ""]
    lines += [*fact_table(_facts(config, size, changes)), ""]
    lines += ["## Use", "", "```python", *usage, "```", ""]
    if table:
        lines += ["## Scores", "", "| data | questions | score | rules |", "|---|---|---|---|", *table, ""]
    lines += ["## Licence", "", "To be filled in, here and as `license` above.", ""]
    return document(facts, lines)


def _scores(run: Path, task: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the student's scores as entries of ``model-index``, and as lines of a table."""
    results, table = [], []
    for data, scores in student_scores(run).items():
        metrics = _metrics(scores)
        if metrics:
            results.append(result(task, data, metrics))
        shown = ", ".join(f"{m['name']} {m['value']:g}" for m in metrics)
        table.append(f"| {' | '.join(map(cell, (data, scores.get('n', ''), shown, scores.get('rules', ''))))} |")
    return results, table


def _facts(config: Mapping[str, Any], size: int, changes: Sequence[str]) -> list[tuple[str, str]]:
    student = config["student"]
    return [
        ("parameters", f"{size / 1e6:.2f} million"),
        ("teacher", ", ".join(map(_whole, _teachers(config)))),
        ("student", _whole(student)),
        ("trained parts", ", ".join(student.get("train") or [])),
        ("trained on", ", ".join(_shares(config["data"]["train"]))),
        ("loss", " + ".join(in_words(config["loss"]))),
        ("optimizer", _pairs(config.get("optimizer"), "lr", "schedule", "warmup", "weight_decay", "max_grad_norm")),
        ("training", _pairs(config.get("training"), "epochs", "steps", "batch_size", "dtype", "seed")),
        ("changed during training", "; ".join(changes)),
        ("ZeRO stage", str((config.get("deepspeed") or {}).get("stage", ""))),
    ]


def _metrics(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "main" in scores and scores["main"] is not None:
        return [{"type": "accuracy", "name": str(scores["metric"]), "value": round(scores["main"], 2)}]
    return [
        {"type": "accuracy", "name": words, "value": round(scores[key], 4)}
        for key, words in (("exact", "exact match"), ("soft", "VQA accuracy"))
        if scores.get(key) is not None
    ]


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
    if cut := model.get("from_teacher"):
        return f"pruned from the teacher: {_pairs(cut, *cut)}"
    parts = []
    for part in ("vision_encoder", "projector", "decoder"):
        if section := model.get(part):
            named = section.get("name") or section.get("type") or (section.get("config") or {}).get("model_type")
            parts.append(hub_name(named) or Path(str(named)).name)
    return " + ".join(parts)


def _shares(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    weights = [s.get("weight", 1.0) for s in sources]
    names = source_names(sources)
    return [name if w == 1 else f"{name} (weight {w:g})" for name, w in zip(names, weights, strict=True)]


def _pairs(section: Mapping[str, Any] | None, *keys: str) -> str:
    found = {key: (section or {}).get(key) for key in keys}
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)
