"""From a sweep's file and words to its runs: settings, seeds, folders and command lines."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data.errors import UserError
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.differences import SEED
from vlm_distill.config.file import explain, load_config, read_yaml
from vlm_distill.config.kinds import kind_of
from vlm_distill.config.sections import RunConfig

from .sections import Axis, SweepSection
from .words import label, override, read_word, safe

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Choice:
    """One value of an axis: its name in folders and tables, its number if it has one, and its overrides."""

    name: str
    overrides: Mapping[str, Any]
    number: float | None = None
    config: Path | None = None


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        setting: the names of its choices, by axis, without the seed.
        numbers: the values of those axes that are numbers.
        seed: the run's.
        folder: the run's; equal configurations share one.
        config, overrides: what its command line names.
        settings: the resolved configuration, as plain values.
        classifier: whether it trains an image classifier.
        caches: folders of caches that must be filled before it.
    """

    setting: Mapping[str, str]
    numbers: Mapping[str, float]
    seed: int
    folder: Path
    config: Path
    overrides: tuple[str, ...]
    settings: Mapping[str, Any]
    classifier: bool
    caches: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the run's name: its folder below the sweep's."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def done(self) -> bool:
        """Return whether the run is finished."""
        return (self.folder / "summary.json").is_file()

    def words(self, command: str, nproc: int | None) -> list[str]:
        """Return the words of ``vlm-distill``, such as ``train CONFIG key=value``."""
        ranks = [] if nproc is None else ["--nproc", str(nproc)]
        return [command, str(self.config), *self.overrides, *ranks]

    @property
    def command(self) -> str:
        """Return the command that trains it."""
        return "classify" if self.classifier else "train"


@dataclass(frozen=True)
class Sweep:
    """A sweep, ready to run.

    Attributes:
        path: its file, or the configuration that is swept from the command line.
        output: folder of all runs.
        axes: choices by axis, without the seeds.
        seeds: of every setting.
        runs: seed by seed, so that a sweep that is broken off has whole seeds. Equal ones share a folder.
        baseline: axis and name of the choice that others are compared with.
        first: sweeps to run before.
    """

    path: Path
    output: Path
    axes: Mapping[str, Sequence[Choice]]
    seeds: Sequence[int]
    runs: Sequence[SweepRun]
    baseline: tuple[str, str] | None
    first: Sequence[Sweep] = ()

    @property
    def distinct(self) -> list[SweepRun]:
        """Return one run for each folder."""
        found: dict[Path, SweepRun] = {}
        for run in self.runs:
            found.setdefault(run.folder, run)
        return list(found.values())


@dataclass
class _Draft:
    """A sweep while its file, limit and words are read."""

    path: Path
    config: Path
    output: str
    overrides: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    baseline: str | None = None
    last: dict[str, Any] = field(default_factory=dict)
    kinds: dict[Path, type[Any]] = field(default_factory=dict)


def read_sweep(path: Path, words: Sequence[str] = (), limit: str | None = None, nproc: int | None = None) -> Sweep:
    """Read a sweep's file, or a run's configuration whose axes are all on the command line; check every run.

    Args:
        path: a file with the keys of :class:`SweepSection`, or one of ``vlm-distill train`` or ``classify``.
        words: ``key=value`` for every run, ``key=a,b,c`` for an axis; names choose among an axis's settings.
        limit: name of a smaller sweep in the file.
        nproc: ranks of each run, if they are known.

    Raises:
        UserError: one line about the file, a word, or the first run whose configuration is wrong.
    """
    return _read(path, words, limit, nproc, ())


def _read(path: Path, words: Sequence[str], limit: str | None, nproc: int | None, above: tuple[Path, ...]) -> Sweep:
    if path.resolve() in above:
        raise UserError(f"{path}: first: sweeps name each other in a circle")
    first: list[Sweep] = []
    content = _content(path)
    if isinstance(content, Mapping) and "axes" in content:
        section = _section(path, content)
        draft = _Draft(
            path,
            _beside(path, section.config),
            section.output,
            dict(section.overrides),
            dict(section.axes),
            section.baseline,
        )
        _apply_limit(draft, section, limit)
        for name in section.first:
            other = _beside(path, name)
            smaller = limit if limit in _section(other, _content(other)).limits else None
            first.append(_read(other, (), smaller, nproc, (*above, path.resolve())))
    else:
        draft = _Draft(path, path, f"runs/{path.stem}-sweep")
        if limit is not None:
            raise UserError(f"{path}: --limit {limit}: only a sweep's file has limits; leave it out")
    _apply_words(draft, words)
    if not draft.axes:
        raise UserError(f"{path}: nothing to compare; name an axis, such as {SEED}=0,1,2")
    return _sweep(draft, first, nproc)


def _content(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{str(path)[:200]}: no such file; give a sweep's file or a run's configuration")
    return read_yaml(path)


def _beside(path: Path, name: str) -> Path:
    """Return a file named relative to another one."""
    return Path(os.path.normpath(path.parent / name))


def _section(path: Path, content: Any) -> SweepSection:
    try:
        return SweepSection.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, SweepSection)}") from None


def _apply_limit(draft: _Draft, section: SweepSection, name: str | None) -> None:
    if name is None:
        return
    if name not in section.limits:
        known = f"there are {', '.join(section.limits)}" if section.limits else "it has none"
        raise UserError(f"{draft.path}: no limit {name!r}; {known}")
    limit = section.limits[name]
    draft.output = limit.output or f"{section.output}-{name}"
    draft.last |= limit.overrides
    for axis, wanted in limit.axes.items():
        if axis not in draft.axes:
            raise UserError(f"{draft.path}: limits.{name}.axes.{axis}: there is no such axis")
        _narrow(draft, axis, wanted, f"limits.{name}.axes.{axis}")


def _apply_words(draft: _Draft, words: Sequence[str]) -> None:
    for word in words:
        key, values = read_word(word)
        if key in draft.axes:
            _narrow(draft, key, values, f"{key}=")
        elif key == "output":
            if len(values) != 1 or not isinstance(values[0], str):
                raise UserError(f"sweep: {word[:200]!r}: output is one folder, for all runs")
            draft.output = values[0]
        elif len(values) > 1:
            draft.axes[key] = values
        else:
            draft.last[key] = values[0]


def _narrow(draft: _Draft, axis: str, wanted: Axis, where: str) -> None:
    """Choose among an axis's named settings, or give it other values."""
    known = draft.axes[axis]
    if isinstance(known, dict) and isinstance(wanted, list):
        for name in wanted:
            if name not in known:
                raise UserError(f"{draft.path}: {where}: no setting {name!r}; there are {', '.join(known)}")
        draft.axes[axis] = {name: known[name] for name in wanted}
    else:
        draft.axes[axis] = wanted


# Choices and runs


def _sweep(draft: _Draft, first: Sequence[Sweep], nproc: int | None) -> Sweep:
    axes = {key: _choices(draft, key, axis) for key, axis in draft.axes.items()}
    baseline = _baseline(draft, axes)
    seeds = axes.pop(SEED, [Choice("", {})])
    runs: list[SweepRun] = []
    folders: dict[str, Path] = {}
    for seed, choices in product(seeds, list(product(*axes.values()))):
        chosen = dict(zip(axes, choices, strict=True))
        name = ",".join(choice.name for choice in choices) or safe(draft.config.stem)
        try:
            run = _run(draft, name, chosen, seed, nproc)
        except UserError as error:
            raise UserError(f"{draft.path}: in the setting {name}: {error}") from None
        # Equal configurations are run once: a student without a teacher is the same beside every teacher.
        digest = _digest(run)
        runs.append(replace(run, folder=folders.setdefault(digest, run.folder)))
    _check_folders(draft, runs)
    numbers = sorted({run.seed for run in runs})
    return Sweep(draft.path, Path(draft.output), axes, numbers, runs, baseline, first)


def _choices(draft: _Draft, key: str, axis: Axis) -> list[Choice]:
    if isinstance(axis, list):
        found = [_value(key, value) for value in axis]
    else:
        found = [_setting(draft, name, overrides) for name, overrides in axis.items()]
    names = [choice.name for choice in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{draft.path}: axis {key}: {name} is given twice; leave one out")
    return found


def _value(key: str, value: Any) -> Choice:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return Choice(f"{key.rpartition('.')[2]}={label(value)}", {key: value}, number)


def _setting(draft: _Draft, name: str, overrides: Mapping[str, Any]) -> Choice:
    config = overrides.get("config")
    if config is not None and not isinstance(config, str):
        raise UserError(f"{draft.path}: setting {name}: config is a file's name")
    plain = {key: value for key, value in overrides.items() if key != "config"}
    return Choice(safe(name), plain, _size(name), config=None if config is None else _beside(draft.path, config))


def _size(name: str) -> float | None:
    """Return the number that a setting is named after, such as 0.1m or 7b; ``None`` for other names."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", name.lower())
    return float(found[1]) * _UNITS[found[2]] if found else None


def _baseline(draft: _Draft, axes: Mapping[str, Sequence[Choice]]) -> tuple[str, str] | None:
    """Return axis and name of the setting that others are compared with."""
    compared = {key: choices for key, choices in axes.items() if key != SEED}
    if draft.baseline is None:
        several = [key for key, choices in compared.items() if len(choices) > 1]
        return (several[0], compared[several[0]][0].name) if several else None
    for key, choices in compared.items():
        if safe(draft.baseline) in [choice.name for choice in choices]:
            return key, safe(draft.baseline)
    names = [choice.name for choices in compared.values() for choice in choices]
    raise UserError(f"{draft.path}: baseline: no setting {draft.baseline!r}; there are {', '.join(names)}")


def _run(draft: _Draft, name: str, chosen: Mapping[str, Choice], seed: Choice, nproc: int | None) -> SweepRun:
    config, values = draft.config, dict(draft.overrides)
    for choice in chosen.values():
        config = choice.config or config
        _put_last(values, choice.overrides)
    _put_last(values, draft.last)
    _put_last(values, seed.overrides)
    overrides = [override(key, value) for key, value in values.items()]
    if config not in draft.kinds:
        draft.kinds[config] = kind_of(config)
    kind = draft.kinds[config]
    number = values[SEED] if SEED in values else load_config(config, overrides, kind).training.seed
    folder = Path(draft.output) / name / f"seed{number}"
    overrides.append(override("output", str(folder)))
    found = load_config(config, overrides, kind)
    split_batch(found, nproc or 1)
    return SweepRun(
        setting={axis: choice.name for axis, choice in chosen.items()},
        numbers={axis: choice.number for axis, choice in chosen.items() if choice.number is not None},
        seed=found.training.seed,
        folder=folder,
        config=config,
        overrides=tuple(overrides),
        settings=found.model_dump(mode="json", exclude_none=True),
        classifier=kind is not RunConfig,
        caches=_caches(found),
    )


def _put_last(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Set values after all that are there, since of two overrides of one key the later one counts."""
    for key, value in more.items():
        values.pop(key, None)
        values[key] = value


def _caches(config: Any) -> tuple[str, ...]:
    """Return the folders that ``vlm-distill cache`` fills; classifiers fill theirs while they train."""
    if not isinstance(config, RunConfig):
        return ()
    found = [teacher.cache.folder for teacher in config.all_teachers.values() if teacher.cache is not None]
    if config.student.vision_cache is not None:
        found.append(config.student.vision_cache)
    return tuple(found)


def _digest(run: SweepRun) -> str:
    plain = {key: value for key, value in run.settings.items() if key != "output"}
    text = json.dumps([plain, run.classifier], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_folders(draft: _Draft, runs: Sequence[SweepRun]) -> None:
    """Refuse two different runs in one folder."""
    seen: dict[Path, str] = {}
    for run in runs:
        digest = _digest(run)
        if seen.setdefault(run.folder, digest) != digest:
            raise UserError(f"{draft.path}: two different runs have the folder {run.folder}; rename a setting")


def shell_line(words: Sequence[str]) -> str:
    """Return a ``vlm-distill`` command as one line for a shell."""
    return shlex.join(["vlm-distill", *words])


def python_line(words: Sequence[str]) -> list[str]:
    """Return the same command as words to start."""
    return [sys.executable, "-m", "vlm_distill.cli", *words]
