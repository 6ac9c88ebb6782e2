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
    """Settings that all layouts share."""

    columns: dict[str, str] = Field(
        default={},
        description="Columns to add: our name, then the file's own column, or a pattern such as `{set}_{figure}`; "
        "a column that the file already has stays as it is.",
    )
    values: dict[str, dict[str, Any]] = Field(default={}, description="By column, the file's value and then ours.")
    constants: dict[str, Any] = Field(default={}, description="Columns that are the same in all rows.")
    lists: tuple[str, ...] = Field(
        (), description="Columns that hold lists written as text; VLMEvalKit's scorers parse these themselves."
    )
    index_answers: bool = Field(False, description="Whether `answer` is an option's number, from 0, not its letter.")

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
    """VLMEvalKit's ``{name}.tsv``."""

    name: str = Field(description="Name of the file, without `.tsv`.")
    also: tuple[str, ...] = Field((), description="Other names of the file; `md5` is not checked under these.")
    md5: str | None = Field(None, description="Published checksum of the file; a difference is a warning.")
    url: str = Field("", description="Where `{name}.tsv` is published, ending in a slash.")

    def published(self) -> str:
        return f"{self.name}.tsv" + (f" ({self.url}{self.name}.tsv)" if self.url else "")

    def open(self, folders: Iterable[Path], images: Path | None) -> Table | None:
        """Return the table, or ``None`` if no folder has the file."""
        for path in (folder / f"{name}.tsv" for folder in folders for name in (self.name, *self.also)):
            if path.is_file():
                return TsvTable(path, images=images, md5=self.md5 if path.stem == self.name else None)
        return None


class HuggingFace(Layout):
    """A Hugging Face data set in the layout that lmms-eval reads."""

    paths: tuple[str, ...] = Field(
        description="Its names on the hub, tried in order. A local copy is looked for under `owner/name` and `name`."
    )
    config: str | None = Field(None, description="Configuration of the data set.")
    split: str = Field(description="Split of the data set.")
    images: tuple[str, ...] = Field(("image",), description="Columns that hold images.")
    pictures: str | None = Field(
        None, description="Configuration that holds the images instead (columns `id` and `image`)."
    )
    pictures_on: str = Field("", description="The questions' column with the image's id.")

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

    file: str = Field(description="JSON file with the records.")
    by: str = Field(description="Column that both have.")
    under: str | None = Field(None, description="Key of the list or object of records, if the file holds more.")
    fields: tuple[str, ...] = Field((), description="Names for the items of records that are lists.")


class Only(Section):
    """A file that lists the ids of each split: ``{split: [id, …]}``."""

    file: str = Field(description="JSON file with the ids.")
    split: str = Field(description="Split that is kept.")
    by: str = Field("id", description="Column with the ids.")


class Official(Layout):
    """The JSON files that a benchmark's authors publish, and a folder of images."""

    files: str | dict[str, str] = Field(
        description="The question file, or several by group; the column `group` then holds each row's group."
    )
    under: str | None = Field(None, description="Key of the list or object of records, if the file holds more.")
    key: str = Field("id", description="In a file that maps ids to records, the column for the id.")
    fields: tuple[str, ...] = Field(
        (), description="Names for the items of records that are lists; the first for values that are not objects."
    )
    group: str = Field("category", description="Column for the group, if there are several files.")
    join: tuple[Join, ...] = Field((), description="Annotations and other records to join.")
    only: Only | None = Field(None, description="Which ids to keep.")
    required: tuple[str, ...] = Field((), description="Columns that a row must have to count as a question.")
    image: str = Field(description="The image's file name, as a pattern of columns.")
    folder: str = Field("", description="The published name of the image folder beside the files.")
    url: str = Field("", description="The page that publishes them.")

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

    path: str = Field(description="File, folder, or name of a dataset.")
    images: str | None = Field(None, description="Folder that relative image paths start from.")
    split: str | None = Field(None, description="Split of a Hugging Face dataset.")
    config: str | None = Field(None, description="Configuration of a Hugging Face dataset.")
    columns: dict[str, str] = Field(default={}, description="Which column holds what: our name, then the file's.")

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
