"""Find a benchmark by name, and its files on disk."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from data.errors import UserError
from vlm_distill.losses.plugins import Plugins

from .benchmark_entry import Benchmark, Rules, load_benchmark, read_benchmark
from .benchmark_questions import BenchmarkQuestions
from .benchmarks import BENCHMARKS
from .scoring.scorers import rules_of

#: Where users keep benchmarks of their own, one YAML file each.
FOLDER = Path("configs/benchmarks")
#: Benchmarks from outside, by name.
PLUGINS = Plugins("benchmark", "vlm_distill.benchmarks", UserError)
for _entry in BENCHMARKS:
    PLUGINS.reserve(dict.fromkeys((_entry.name, *_entry.aliases, _entry.dataset), f"{__package__}.benchmarks"))
register = PLUGINS.register


def data_folder(given: str | Path | None = None) -> Path:
    """Return the given folder, or else VLMEvalKit's: ``$LMUData``, by default ``~/LMUData``."""
    return Path(given or os.environ.get("LMUData") or Path.home() / "LMUData")  # noqa: SIM112


def get_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name.

    Args:
        name: one of its names; the path of a YAML file, or its name in ``configs/benchmarks``; a plug-in's name, or its
            ``module:attribute``.

    Raises:
        UserError: there is none; names the nearest.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_benchmark(path)
    if (own := FOLDER / f"{name}.yaml").is_file():
        return load_benchmark(own)
    names = {}
    for entry in BENCHMARKS:
        for known in (entry.name, *entry.aliases, entry.dataset):
            names[_plain(known)] = entry
    if _plain(name) in names:
        return names[_plain(name)]
    if name in PLUGINS:
        return _from_outside(name)
    near = difflib.get_close_matches(_plain(path.stem), names, n=1)  # a name, also if a table's path is given
    known = ", ".join([*(entry.name for entry in BENCHMARKS), *PLUGINS.names()])
    raise UserError(
        f"no benchmark {name!r}; "
        + (f"did you mean {names[near[0]].name!r}? There" if near else "there")
        + f" are {known}, and YAML files (in {FOLDER})"
    )


def _from_outside(name: str) -> Benchmark:
    """Return a plug-in's benchmark, which it gives as a :class:`Benchmark` or as a mapping with the same keys."""
    found = PLUGINS.find(name)
    if isinstance(found, Benchmark):
        return found
    if not isinstance(found, Mapping):
        raise UserError(
            f"benchmark {name}: is a {type(found).__name__}; make it a mapping with keys such as tsv, prompt and scorer"
        )
    return read_benchmark({"name": name.rpartition(":")[2], **found}, f"benchmark {name}")


def available() -> dict[str, str]:
    """Return the names of all benchmarks, each with its files and rules, or for a plug-in where it is from."""
    found = {}
    for entry in BENCHMARKS:
        found[entry.name] = f"{', '.join(entry.layouts())}; rules: {', '.join(rules_of(entry.scorer))}"
    for name, origin in PLUGINS.names().items():
        found[name] = f"plug-in: {origin}"
    return found


def entry_name(given: str) -> str:
    """Return a name by which the benchmark is found from any folder: a YAML file's whole path, or the name itself."""
    path = Path(given)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{given}.yaml"
    return str(path.resolve()) if path.is_file() else given


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def find_questions(
    name: str | Benchmark,
    data: str | Path | None = None,
    *,
    rules: Rules = "vlmevalkit",
    format: str | None = None,
    images: Path | None = None,
) -> BenchmarkQuestions:
    """Open a benchmark's questions.

    Files are looked for in the data folder, and in subfolders with one of the benchmark's names.

    Args:
        name: a name for :func:`get_benchmark`, or an entry.
        data: the data folder (:func:`data_folder`).
        rules: whose prompts and columns.
        format: use only this layout. With ``huggingface``, data that are not in the data folder come from the hub.
        images: the image folder, if it is not where the publishers put it.

    Raises:
        UserError: there is no such benchmark, or its files are missing or broken.
    """
    entry = get_benchmark(name) if isinstance(name, str) else name
    folder = data_folder(data)
    folders = [folder, *(folder / known for known in dict.fromkeys([entry.name, *entry.aliases, entry.dataset]))]
    layouts = entry.layouts()
    if format is not None and format not in layouts:
        raise UserError(f"{entry.name} does not come as {format}; it comes as {', '.join(layouts)}")
    for kind, layout in layouts.items():
        if format in (None, kind) and (table := layout.open(folders, images)) is not None:
            return entry.questions(table, layout, rules)
    if format == "huggingface" and entry.huggingface is not None:
        return entry.questions(entry.huggingface.open_hub(), entry.huggingface, rules)
    wanted = " or ".join(layout.published() for kind, layout in layouts.items() if format in (None, kind))
    raise UserError(
        f"{entry.name}: no data in {folder}; put there {wanted}; or name another folder (--data, "
        "evaluation.benchmark_data, $LMUData)"
    )
