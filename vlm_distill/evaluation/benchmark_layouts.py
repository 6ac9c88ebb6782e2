"""Layouts of a benchmark's files, each opened as a table: VLMEvalKit's TSV, Hugging Face, official JSON, a source.

A layout knows which files it needs and where they are published. Columns keep their names; columns that scorers and
prompts need under another name are added.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from data.datasets_library import open_dataset
from data.errors import UserError
from data.json_tables import Records, join_rows, json_table, read_records
from data.opening import open_source
from data.tables import HuggingFaceTable, Selection, SourceTable, Table
from data.tsv import TsvTable
from vlm_distill.config.fields import Section


class Layout(Section):
    """Settings that all layouts share.

    Attributes:
        columns: columns to add, name → the file's own column, or a pattern such as ``{set_id}_{figure_id}``. A column
            that the file already has stays as it is.
        values: by column, the file's value → ours.
        constants: columns that are the same in all rows.
        lists: columns that hold lists written as text. VLMEvalKit's scorers parse these themselves, others do not.
        index_answers: whether ``answer`` is an option's number, from 0, instead of its letter.
    """

    columns: dict[str, str] = Field(default={})
    values: dict[str, dict[str, Any]] = Field(default={})
    constants: dict[str, Any] = Field(default={})
    lists: tuple[str, ...] = ()
    index_answers: bool = False

    def complete(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with the added columns."""
        row |= self.constants
        for name, own in self.columns.items():
            if name in row:
                continue
            with suppress(KeyError, TypeError):  # the scorer or prompt that needs the column reports it
                row[name] = own.format_map(row) if "{" in own else row[own]
        for name, translated in self.values.items():
            if name in row:
                row[name] = translated.get(str(row[name]), row[name])
        return row


class Tsv(Layout):
    """VLMEvalKit's ``{name}.tsv``.

    Attributes:
        also: other names of the file; ``md5`` is not checked under these.
        url: where ``{name}.tsv`` is published, ending in a slash.
    """

    name: str
    also: tuple[str, ...] = ()
    md5: str | None = None
    url: str = ""

    def published(self) -> str:
        return f"{self.name}.tsv" + (f" ({self.url}{self.name}.tsv)" if self.url else "")

    def open(self, folders: Iterable[Path], images: Path | None) -> Table | None:
        """Return the table, or ``None`` if no folder has the file."""
        for path in (folder / f"{name}.tsv" for folder in folders for name in (self.name, *self.also)):
            if path.is_file():
                return TsvTable(path, images=images, md5=self.md5 if path.stem == self.name else None)
        return None


class HuggingFace(Layout):
    """A Hugging Face data set in the layout that lmms-eval reads.

    Attributes:
        paths: its names on the hub, tried in order. A local copy is looked for under ``owner/name`` and ``name``.
        images: columns that hold images.
        pictures: configuration that holds the images instead (columns ``id`` and ``image``).
        pictures_on: the questions' column with the image's id.
    """

    paths: tuple[str, ...]
    config: str | None = None
    split: str
    images: tuple[str, ...] = ("image",)
    pictures: str | None = None
    pictures_on: str = ""

    def published(self) -> str:
        return f"the Hugging Face data set {self.paths[0]}"

    def open(self, folders: Iterable[Path], images: Path | None) -> Table | None:
        del images  # the table holds them
        for folder in folders:
            for path in self.paths:
                for local in (folder / path, folder / path.split("/")[-1]):
                    # A folder of that name may hold another layout.
                    if any(local.rglob("*.parquet")) or any(local.rglob("*.arrow")):
                        return self._table(str(local))
        return None

    def open_hub(self) -> Table:
        """Return the data set from the hub, or from the cache of ``datasets``.

        Raises:
            UserError: it is not available under any of its names.
        """
        for path in self.paths[:-1]:
            try:
                return self._table(path)
            except UserError:
                continue
        return self._table(self.paths[-1])

    def _table(self, given: str) -> Table:
        pictures = None if self.pictures is None else self._dataset(given, self.pictures)
        return HuggingFaceTable(
            self._dataset(given, self.config),
            given,
            self.images,
            pictures=pictures,
            pictures_on=self.pictures_on,
            given=given,
        )

    def _dataset(self, given: str, config: str | None) -> Any:
        folder = Path(given)
        # A single table, as `save_to_disk` writes it, has no splits to choose from.
        split = None if (folder / "state.json").is_file() else self.split
        return open_dataset(folder, str(folder), split, config)


class Join(Section):
    """A file whose records are joined to the questions by the column ``by``. (Not ``on``, which YAML reads as true.)"""

    file: str
    by: str
    under: str | None = None
    fields: tuple[str, ...] = ()


class Only(Section):
    """A file that lists the ids of each split: ``{split: [id, …]}``."""

    file: str
    split: str
    by: str = "id"


class Official(Layout):
    """The JSON files that a benchmark's authors publish, and a folder of images.

    Attributes:
        files: the question file, or several by group; the column ``group`` then holds each row's group.
        under, key, fields: where records are in these files (:class:`~data.json_tables.Records`).
        join: annotations and other records to join.
        only: which ids to keep.
        required: columns that a row must have to count as a question.
        image: the image's file name, as a pattern of columns.
        folder: the published name of the image folder beside the files.
        url: the page that publishes them.
    """

    files: str | dict[str, str]
    under: str | None = None
    key: str = "id"
    fields: tuple[str, ...] = ()
    group: str = "category"
    join: tuple[Join, ...] = ()
    only: Only | None = None
    required: tuple[str, ...] = ()
    image: str
    folder: str = ""
    url: str = ""

    def published(self) -> str:
        return f"{', '.join(self._names())}" + (f" ({self.url})" if self.url else "")

    def _names(self) -> list[str]:
        questions = [self.files] if isinstance(self.files, str) else list(self.files.values())
        return [*questions, *(join.file for join in self.join), *([self.only.file] if self.only else [])]

    def open(self, folders: Iterable[Path], images: Path | None) -> Table | None:
        for folder in folders:
            present = [(folder / name).is_file() for name in self._names()]
            if all(present):
                return self._table(folder, images)
            if present[0]:
                lacking = ", ".join(name for name, there in zip(self._names(), present, strict=True) if not there)
                raise UserError(f"{folder} has {self._names()[0]} but not {lacking}; put it there ({self.url})")
        return None

    def _table(self, folder: Path, images: Path | None) -> Table:
        groups = {None: self.files} if isinstance(self.files, str) else self.files
        rows = []
        for group, name in groups.items():
            found = read_records(Records(folder / name, self.under, self.key, self.fields))
            rows += found if group is None else [{**row, self.group: group} for row in found]
        for join in self.join:
            path = folder / join.file
            other = read_records(Records(path, join.under, join.by, join.fields))
            rows = join_rows(rows, join.by, other, files=(folder / self._names()[0], path))
        if self.only is not None:
            rows = self._chosen(self.only, folder, rows)
        for column in self.required:
            rows = [row for row in rows if row.get(column) is not None]
        beside = folder / self.folder
        where = images or (beside if beside.is_dir() else folder)
        return json_table(folder.name, rows, [folder / name for name in self._names()], where, self.image)

    def _chosen(self, only: Only, folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        path = folder / only.file
        splits = {row["split"]: row["ids"] for row in read_records(Records(path, None, "split", ("ids",)))}
        if only.split not in splits:
            raise UserError(f"{path} has no split {only.split!r}; it has {', '.join(map(str, splits))}")
        by_id = {str(row.get(only.by)): row for row in rows}
        lacking = [key for key in splits[only.split] if str(key) not in by_id]
        if lacking:
            raise UserError(f"{path}: split {only.split!r} asks for {only.by} {lacking[0]}, which the questions lack")
        return [by_id[str(key)] for key in splits[only.split]]


class SourceFile(Layout):
    """Anything that training reads (``docs/data.md``): a path, perhaps in the data folder, or a name on the hub."""

    path: str
    images: str | None = None
    split: str | None = None
    config: str | None = None
    columns: dict[str, str] = Field(default={})

    def published(self) -> str:
        return self.path

    def open(self, folders: Iterable[Path], images: Path | None) -> Table | None:
        for path in (*(folder / self.path for folder in folders), Path(self.path)):
            if path.exists():
                own = path.parent / self.images if self.images else None
                source = open_source(
                    path,
                    images=images or own,
                    split=self.split,
                    config=self.config,
                    columns=self.columns,
                    answers_required=False,
                )
                return SourceTable(source)
        return None


def selected(table: Table, where: dict[str, Any]) -> Table:
    """Return the rows whose columns hold the values in ``where``; columns that the table lacks do not count.

    Raises:
        UserError: there is no such row.
    """
    wanted: dict[str, set[str]] = {}
    for column, values in where.items():
        if column in table.columns:
            wanted[column] = set(map(str, values if isinstance(values, list | tuple) else [values]))
    if not wanted:
        return table

    def belongs(row: dict[str, Any]) -> bool:
        return all(str(row.get(column)) in values for column, values in wanted.items())

    rows = [number for number in range(len(table)) if belongs(table[number])]
    if not rows:
        raise UserError(f"{table.name} has no row with {', '.join(f'{key} {value}' for key, value in where.items())}")
    return Selection(table, rows)
