"""Write one self-contained HTML page about one run, or about several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from vlm_distill.evaluation.seed_groups import is_seed_folder
from vlm_distill.version import __version__

from . import seeds
from .answer_sections import answer_sections, best_student
from .benchmark_sections import benchmark_sections, not_scored
from .class_sections import classification_sections
from .curves import charts, meanings
from .entries import Run
from .language_sections import language_sections
from .planned import planned_sections
from .rendering import environment
from .run_facts import differing_settings, headline, speed_and_memory
from .run_folder import load_run
from .teacher_sections import teacher_sections

_COLOURS = 5


def write_report(
    runs: Sequence[Path] | Mapping[str, Path],
    out: Path | None = None,
    *,
    title: str | None = None,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the report and return its path.

    Args:
        runs: run folders, the most important first. A mapping also names the runs; by default they are named after
            their folders.
        out: the file to write. Default: ``report.html`` in the run's folder, or beside the folders of several runs.
        title: the page's heading.
        baselines: scores (as in ``scores.json``) of models that are not runs, by name; shown with the first data set.

    Raises:
        UserError: a folder is not a run's, or a file in it cannot be read.
    """
    named = dict(runs) if isinstance(runs, Mapping) else _named(runs)
    if not named:
        raise UserError("report: no run given; name at least one folder that `vlm-distill train` wrote")
    loaded = [load_run(folder, label, "") for label, folder in named.items()]
    # Runs that differ by their seed alone share a colour.
    colours = {training: f"c{i % _COLOURS}" for i, training in enumerate(seeds.name_trainings(loaded))}
    for run in loaded:
        run.css = colours[run.training]
    try:
        page = _page(loaded, title, baselines or {})
    except UserError:
        raise
    except Exception as error:  # a value of a kind that no run writes can fail anywhere on the page
        files = ", ".join(map(str, named.values()))
        raise UserError(f"{files}: a file there holds what no run writes ({error!r}); run it again") from error
    if out is None:
        first = loaded[0].folder
        out = (first if len(loaded) == 1 else first.parent) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8", errors="backslashreplace")  # answers may hold half a surrogate pair
    return out


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Name runs after their folders, and after the folder above where that is needed to tell them apart."""
    named: dict[str, Path] = {}
    for folder in folders:
        label = folder.resolve().name
        longer = label in named or is_seed_folder(folder.resolve())
        named[f"{folder.resolve().parent.name}/{label}" if longer else label] = folder
    return named


def _page(runs: list[Run], title: str | None, baselines: Mapping[str, Mapping[str, Any]]) -> str:
    sections = answer_sections(runs, baselines)
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
            taught=teacher_sections(runs),
            headline={**headline(runs, first[0]["entries"] if first else []), "asked": bool(sections)},
            best=best_student,
            meanings=meanings(runs),
            charts=charts(runs, [*first, *benchmarks, *language]),
            facts=speed_and_memory(runs),
            planned=planned_sections(runs),
            problems=[(run, run.summary["problems"]) for run in runs if run.summary.get("problems")],
            differences=differing_settings(runs),
            version=__version__,
        )
    )
