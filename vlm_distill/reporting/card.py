"""Model cards: metadata that the Hugging Face hub reads, through its own library, and the same in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import one_line
from vlm_distill.config.sections import TermSection
from vlm_distill.losses import LossError, Registry

from .card_scores import CardScore

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

#: What cards' code calls the exported folder.
FOLDER = "path/to/this/folder"


@dataclass(frozen=True)
class Publication:
    """What a card says beyond what the run's folder knows.

    Attributes:
        licence: as the hub names it, such as ``apache-2.0``; ``None`` leaves it to be filled in.
        hub: the name under which the folder is uploaded.
        evaluations: folders of further evaluations of the student.
    """

    licence: str | None = None
    hub: str | None = None
    evaluations: Sequence[Path] = ()


def document(name: str, task: str, metadata: Mapping[str, Any], scores: Sequence[CardScore], text: str) -> str:
    """Return a card: the hub's metadata, and the text.

    Args:
        name: the model's name.
        task: the hub's name of what the model does, such as ``image-text-to-text``.
        metadata: further keys of the hub's metadata; without ``license``, it is left to be filled in.
        scores: for ``model-index``.
        text: Markdown.
    """
    from huggingface_hub import ModelCardData

    results = [_result(task, score) for score in scores] or None
    data = ModelCardData(model_name=name, pipeline_tag=task, eval_results=results, **metadata)
    front = data.to_yaml()
    if metadata.get("license") is None:
        front += "\n# license: yours to choose; mind those of the data and of every base model"
    return f"---\n{front}\n---\n\n{text}"


def _result(task: str, score: CardScore) -> EvalResult:
    """Return a score as an entry of ``model-index``, whose form has no key of its own for intervals."""
    from huggingface_hub import EvalResult

    about: dict[str, Any] = {"n": score.n}
    if score.interval is not None:
        about["interval_95"] = [round(bound, 4) for bound in score.interval]
    if score.rules:
        about["rules"] = score.rules
    return EvalResult(
        task_type=task,
        dataset_type=score.data,
        dataset_name=score.data,
        metric_type=score.kind,
        metric_name=score.metric,
        metric_value=round(score.value, 4),
        metric_args=about,
    )


def score_section(scores: Sequence[CardScore]) -> list[str]:
    """Return the lines of the card's section on scores; none without scores."""
    if not scores:
        return []
    headings = ["data", "metric", "student", "95 % interval", "teacher", "n", "rules"]
    note = (
        "Intervals: Wilson's for exact match and top-1; for other means over questions a bootstrap over pictures. They "
        "span the questions asked, not what another seed of the training would give."
    )
    rows = [score.row() for score in scores]
    return ["## Scores", "", *table(headings, rows), "", note, ""]


def use_section(code: Sequence[str], commands: Sequence[str], publication: Publication) -> list[str]:
    """Return the lines of the card's section on use: Python code, and commands of this suite."""
    lines = ["## Use", "", "```python", *code, "```", ""]
    if commands:
        lines += ["With vlm-distill:", "", "```bash"]
        if publication.hub is not None:
            lines.append(f"hf download {publication.hub} --local-dir {FOLDER}")
        lines += [*commands, "```", ""]
    return lines


def licence_section(publication: Publication) -> list[str]:
    """Return the lines of the card's section on the licence."""
    told = publication.licence or "To be filled in, here and as `license` above."
    return ["## Licence", "", told, ""]


def loss_section(losses: Sequence[Mapping[str, Any]], registry: Registry[Any]) -> list[str]:
    """Return the lines of the card's section on the loss: each term with its weight and all its settings."""
    rows = []
    for term in losses:
        given = {key: value for key, value in term.items() if not _is_usual(key, value)}
        summary, defaults = _described(term["name"], registry)
        others = {key: value for key, value in defaults.items() if key not in given and value is not None}
        settings = [pairs(given, *given), f"by default {pairs(others, *others)}" if others else ""]
        rows.append([term["name"], f"{term.get('weight', 1.0):g}", "; ".join(filter(None, settings)), summary])
    return ["## Loss", "", *table(["term", "weight", "settings", "what it is"], rows), ""]


def _is_usual(key: str, value: Any) -> bool:
    """Return whether a key of a term says nothing of its own: name and weight, or what every term has by default."""
    field = TermSection.model_fields.get(key)
    return key in ("name", "weight") or value is None or (field is not None and value == field.default)


def _described(name: str, registry: Registry[Any]) -> tuple[str, dict[str, Any]]:
    """Return a loss's summary and the defaults of its parameters; nothing of a plug-in that is not installed."""
    try:
        entry = registry.entry(name)
        parameters = inspect.signature(entry.load()).parameters
        return entry.summary(), {key: parameters[key].default for key in entry.parameters if key in parameters}
    except (LossError, LookupError):
        return "", {}


def data_section(config: Mapping[str, Any], rows: Sequence[int] = ()) -> list[str]:
    """Return the lines of the card's section on training data.

    Args:
        config: the run's configuration, as plain data.
        rows: number of samples of each source; empty if unknown.
    """
    lines = []
    sources = config["data"]["train"]
    counts = [f"{number:,}" for number in rows] if len(rows) == len(sources) else [""] * len(sources)
    for source, name, count in zip(sources, source_names(sources), counts, strict=True):
        split = "/".join(filter(None, [source.get("config"), source.get("split")]))
        where = hub_name(source["path"]) or Path(source["path"]).name
        lines.append([name, where, split, count, f"{source.get('weight', 1.0):g}"])
    return ["## Training data", "", *table(["source", "from", "split", "samples", "weight"], lines), ""]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, without columns that are empty in all rows."""
    cells = [[cell(value) for value in row] for row in rows]
    kept = [column for column in range(len(headings)) if any(row[column] for row in cells)]
    lines = [[headings[column] for column in kept], ["---"] * len(kept)]
    lines += [[row[column] for column in kept] for row in cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def hub_name(name: str | None) -> str | None:
    """Return ``name`` if it looks like ``owner/name`` on the hub and is not a local file or folder."""
    if name is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        return None
    return None if name.endswith((".json", ".jsonl", ".ndjson", ".parquet", ".arrow")) else name


def source_names(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of a run's data sources."""
    return [s.get("name") or hub_name(s["path"]) or Path(s["path"]).name for s in sources]


def fact_table(rows: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the lines of a table of facts, without empty ones."""
    return ["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows if value)]


def cell(value: Any) -> str:
    """Return a value as one line of plain text for a Markdown table, with any markup escaped."""
    return one_line(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def pairs(section: Mapping[str, Any] | None, *keys: str) -> str:
    """Return those of a section's keys that have a value, as text: ``lr 0.001, schedule cosine``."""
    found = {key: (section or {}).get(key) for key in keys}
    return ", ".join(f"{key} {value}" for key, value in found.items() if value is not None)
