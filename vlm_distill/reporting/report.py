"""One self-contained HTML page about one run, or about several side by side."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from data.errors import BadSample, UserError
from data.images import load_image
from vlm_distill import __version__
from vlm_distill.config.file import read_saved
from vlm_distill.evaluation.runner import read_predictions

from . import plots, seeds
from .benchmark_sections import benchmark_sections, is_benchmark, not_scored
from .class_sections import classification_sections, is_classification
from .entries import Duel, Entry, Run, duel, entries_on
from .gallery import gallery
from .language_sections import MEASURES, has_answers, language_sections
from .planned import planned_sections

_COLOURS = 5
_THUMBNAIL = 224

#: Titles of the curves that every run has; any other ``term/value`` of the metrics is shown under its own name.
_CURVES = {"loss": "Loss, weighted sum", "lr": "Learning rate", "grad_norm": "Gradient norm"}


def write_report(
    runs: Sequence[Path] | Mapping[str, Path],
    out: Path | None = None,
    *,
    title: str | None = None,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Writes the report.

    Args:
        runs: run folders, the one that matters most first; a mapping gives the names they go by, which are otherwise
            those of the folders.
        out: the file to write; ``report.html`` in the run's folder, or beside the folders of several runs, if absent.
        title: the page's heading.
        baselines: scores (as in ``scores.json``) of what is no run, by name; shown with the first data set.

    Returns:
        The file written.

    Raises:
        UserError: a folder is not a run's, or a file in it cannot be read.
    """
    named = dict(runs) if isinstance(runs, Mapping) else {}
    if not isinstance(runs, Mapping):
        for folder in runs:
            label = folder.resolve().name
            longer = label in named or seeds.family(folder.resolve()) is not None
            named[f"{folder.resolve().parent.name}/{label}" if longer else label] = folder
    if not named:
        raise UserError("report: no run given; name at least one folder that `vlm-distill train` wrote")
    # Runs that differ by their seed alone have one colour.
    families = {label: seeds.family(folder.resolve()) or label for label, folder in named.items()}
    colours = {family: f"c{i % _COLOURS}" for i, family in enumerate(dict.fromkeys(families.values()))}
    loaded = [load_run(folder, label, colours[families[label]]) for label, folder in named.items()]
    try:
        page = _page(loaded, title, baselines or {})
    except UserError:
        raise
    except Exception as error:  # values of another kind than a run writes can fail anywhere on the page
        files = ", ".join(map(str, named.values()))
        raise UserError(f"{files}: a file there holds what no run writes ({error!r}); run it again") from error
    if out is None:
        first = loaded[0].folder
        out = (first if len(loaded) == 1 else first.parent) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8", errors="backslashreplace")  # half an emoji in an answer, say
    return out


def load_run(folder: Path, label: str, css: str) -> Run:
    """Reads a run folder; what a run has not (yet) written is simply absent.

    Raises:
        UserError: it holds neither configuration nor metrics, or a file is damaged.
    """
    folder = folder.resolve()
    config, metrics, summary = (folder / name for name in ("config.yaml", "metrics.jsonl", "summary.json"))
    if not (config.is_file() or metrics.is_file()):
        raise UserError(
            f"{folder}: not a run folder (no config.yaml, no metrics.jsonl); give one that `vlm-distill train` wrote"
        )
    text = _read_text(config) if config.is_file() else ""
    lines = _read_lines(metrics) if metrics.is_file() else []
    run = Run(
        label,
        css,
        folder,
        text,
        _settings(config) if text.strip() else {},
        [line for line in lines if line.get("kind") == "train"],
        [line for line in lines if line.get("kind") == "eval"],
        _read_json(summary) if summary.is_file() else {},
    )
    for scores in sorted(folder.glob("evaluation/*/*/scores.json")):
        key = scores.parent.parent.name, scores.parent.name
        run.scores[key] = _read_json(scores)
        predictions = scores.with_name("predictions.jsonl")
        run.predictions[key] = read_predictions(predictions) if predictions.is_file() else []
    return run


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); run the command that wrote it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run the command that wrote it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; run the command that wrote it again")
    return content


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = _read_text(path).splitlines()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # a run that is killed leaves its last line half-written
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            raise UserError(f"{path}, line {number}: not a JSON object; remove the line or train again") from None
    return entries


def _settings(path: Path) -> dict[str, Any]:
    """The configuration as flat ``section.key`` to value."""
    return dict(_flat(read_saved(path)))


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def environment() -> jinja2.Environment:
    """Templates with every value escaped."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm_distill.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        percent=plots.percent,
        points=plots.points,
        compact=plots.compact,
        duration=plots.duration,
        size=plots.size_in_bytes,
        swatch=lambda entry: plots.swatch(entry.css, entry.label),
        thousands=lambda n: f"{n:,}",
        data_uri=picture,
        number=lambda value: "–" if value is None else f"{value:,.1f}",
        decimals=lambda value: "–" if value is None else f"{value:.3f}",
    )
    return env


def _page(runs: list[Run], title: str | None, baselines: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(
        dict.fromkeys(
            key[0]
            for run in runs
            for key, found in run.scores.items()
            if not is_benchmark(found) and not is_classification(found) and has_answers(found)
        )
    )
    sections: list[dict[str, Any]] = []
    for i, data in enumerate(names):
        entries = entries_on(runs, data, baselines if i == 0 else {})
        sections.append(
            {
                "data": data,
                "entries": entries,
                "kinds": list(dict.fromkeys(k for e in entries for k in e.scores.get("by_type", {}))),
                "duels": _duels([e for e in entries if e.role == "student"]),
                "gallery": gallery([e for e in entries if e.predictions]),
            }
        )
    benchmarks = benchmark_sections(runs)
    classified = classification_sections(runs, {} if sections else baselines)
    language = language_sections(runs)
    first = [*sections, *classified]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title or "Distillation report",
            runs=runs,
            sections=sections,
            benchmarks=benchmarks,
            not_scored=not_scored(runs),
            classified=classified,
            language=language,
            headline={**_headline(runs, first[0]["entries"] if first else []), "asked": bool(sections)},
            best=_best,
            charts=_charts(runs, [*first, *benchmarks, *language]),
            facts=_facts(runs),
            planned=planned_sections(runs),
            problems=[(run, run.summary["problems"]) for run in runs if run.summary.get("problems")],
            differences=_differences(runs),
            version=__version__,
        )
    )


def _headline(runs: list[Run], entries: list[Entry]) -> dict[str, Any]:
    """What the first sentences say; the first run is the one that matters."""
    sizes = runs[0].summary.get("parameters", {})
    student = next((e for e in entries if e.role == "student"), None)
    teacher = next((e for e in entries if e.role == "teacher"), None)
    return {
        "student": sizes.get("student"),
        "teacher": sizes.get("teacher"),
        "share": sizes["student"] / sizes["teacher"] if sizes.get("student") and sizes.get("teacher") else None,
        "accuracy": student and student.scores.get("exact"),
        "n": student and student.scores.get("n"),
        "teacher_accuracy": teacher and teacher.scores.get("exact"),
    }


def _best(entries: list[Entry], kind: str | None) -> Entry | None:
    """The better student, if there are several and one is."""
    scored = []
    for entry in entries:
        scores = entry.scores if kind is None else entry.scores.get("by_type", {}).get(kind, {})
        if entry.role == "student" and scores.get("exact") is not None:
            scored.append((scores["exact"], entry))
    top = [entry for value, entry in scored if value == max(v for v, _ in scored)]
    return top[0] if len(scored) > 1 and len(top) == 1 else None


def _duels(students: list[Entry]) -> list[Duel]:
    """The first student against each other one."""
    duels = []
    for other in students[1:]:
        first = students[0]
        if first.predictions and other.predictions:
            duels.append(duel(first, other))
    return duels


def picture(path: str | Path | None) -> dict[str, Any] | None:
    """A picture as a ``data:`` address of at most 224 pixels a side, or ``None`` where there is no readable file."""
    if path is None or str(path).startswith("sha256:"):
        return None
    try:
        return image_uri(load_image(str(path)), _THUMBNAIL)
    except BadSample:
        return None


def image_uri(image: Image.Image, largest: int) -> dict[str, Any]:
    """``uri``, and ``tiny`` where the pixels are few enough to be worth seeing."""
    image = image.convert("RGB")
    tiny = max(image.size) <= 96
    image.thumbnail((largest, largest))
    buffer, kind = io.BytesIO(), "png" if tiny else "jpeg"
    image.save(buffer, kind, **({"optimize": True} if tiny else {"quality": 82}))
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": f"data:image/{kind};base64,{content}", "tiny": tiny}


def _line(run: Run, lines: list[dict[str, Any]], x: str, y: str, *, smooth: bool = False) -> plots.Series:
    found = [(float(e[x]), float(e[y])) for e in lines if _is_number(e.get(x)) and _is_number(e.get(y))]
    return plots.Series(run.label, run.css, found, smooth)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _charts(runs: list[Run], sections: list[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """(caption, chart) of accuracy by step and by time, then of every curve of the training."""
    charts = []
    kinds = [("exact", "exact", "Accuracy"), ("score", "main", "Score")]
    kinds += [(key, key, title) for key, (title, _) in MEASURES.items()]
    for key, level, title in kinds:
        levels = {
            section["data"]: [
                plots.Series(e.label, e.css, [(0.0, e.scores[level])], level=True)
                for e in section["entries"]
                if e.role != "student" and _is_number(e.scores.get(level))
            ]
            for section in sections
        }
        scored = [[e for e in run.evaluations if key in e] for run in runs]
        data_sets = list(dict.fromkeys(str(e.get("data", "")) for found in scored for e in found))
        for data in data_sets:
            for x, unit in (("step", "step"), ("seconds", "second")):
                lines = [
                    _line(run, [e for e in found if str(e.get("data", "")) == data], x, key)
                    for run, found in zip(runs, scored, strict=True)
                ]
                # Neither a score's nor a measure's name says anything without its data's.
                caption = f"{title} by {unit}" + (f" · {data}" if len(data_sets) > 1 or key != "exact" else "")
                lines += levels.get(data, [])
                chart = plots.line_chart(caption, lines, x_label=f"{unit}s", percent=key in ("exact", "rouge_l"))
                charts.append((caption, chart))
    names = dict.fromkeys(name for run in runs for e in run.train[:50] for name in e)
    terms = [name for name in names if "/" in name]
    for name in ["loss", *sorted(terms, key=lambda n: not n.endswith("/loss")), "lr", "grad_norm"]:
        caption = _CURVES.get(name) or name.replace("_", " ").replace("/", " · ")
        noisy = name == "grad_norm" or name.split("/")[-1] == "loss"
        lines = [_line(run, run.train, "step", name, smooth=noisy) for run in runs]
        charts.append((caption, plots.line_chart(caption, lines, x_label="steps")))
    return [(caption, chart) for caption, chart in charts if chart]


def _facts(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Speed and memory: (what, one text a run); rows that no run knows are left out."""

    def texts(value: Any) -> list[str]:
        return [value(run) for run in runs]

    def found(run: Run, show: Any, *path: str) -> str:
        value: Any = run.summary
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return "" if value is None else show(value)

    def median(run: Run, key: str, show: Any = plots.compact) -> str:
        values = sorted(e[key] for e in run.train if _is_number(e.get(key)))
        return show(values[len(values) // 2]) if values else ""

    rows = [
        ("Device", texts(lambda r: found(r, str, "device"))),
        ("Ranks", texts(lambda r: found(r, str, "ranks"))),
        ("Steps", texts(lambda r: found(r, "{:,}".format, "steps"))),
        ("Time", texts(lambda r: found(r, plots.duration, "seconds"))),
        ("Tokens per second (median)", texts(lambda r: median(r, "tokens_per_second"))),
        ("Images per second (median)", texts(lambda r: median(r, "images_per_second"))),
        ("FLOPs per second (median)", texts(lambda r: median(r, "flops_per_second", "{:.3g}".format))),
        ("MFU (median)", texts(lambda r: median(r, "mfu", plots.percent))),
        ("Waiting for data (median)", texts(lambda r: median(r, "waiting", plots.percent))),
        ("Rows left out", texts(lambda r: found(r, "{:.1%}".format, "left_out"))),
        (
            "Empty steps",
            texts(lambda r: found(r, "{:,}".format, "empty_steps") if r.summary.get("empty_steps") else ""),
        ),
        ("Peak memory of a rank", texts(lambda r: found(r, plots.size_in_bytes, "memory", "peak_bytes"))),
        ("Parameters, student", texts(lambda r: found(r, "{:,}".format, "parameters", "student"))),
        ("Parameters, trained", texts(lambda r: found(r, "{:,}".format, "parameters", "trained"))),
        ("Parameters, teacher", texts(lambda r: found(r, "{:,}".format, "parameters", "teacher"))),
    ]
    for key in dict.fromkeys(k for run in runs for k in run.summary.get("speed", {})):
        label = key.replace("_", " ").capitalize()
        rows.append((label, texts(lambda r, k=key: found(r, _plain, "speed", k))))
    return [(what, values) for what, values in rows if any(values)]


def _plain(value: Any) -> str:
    return plots.compact(value) if _is_number(value) else str(value)


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ: (key, one text a run)."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = []
    for key in keys:
        values = [str(run.settings[key]) if key in run.settings else "–" for run in runs]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows
