"""Where a benchmark's files stand and how they become a table: VLMEvalKit's TSV, Hugging Face, official JSON, a source.

Each layout knows which files it needs and where they are published. Its columns keep their names; those that scorers
and prompts need under another name are given beside them.
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
    """What all layouts share.

    Attributes:
        columns: further columns, name → the file's own column, or a pattern such as ``{set_id}_{figure_id}``. A column
            that the file has stays as it is.
        values: for a column, the file's value → ours.
        constants: columns that are the same in all rows.
        lists: columns that hold the literals of lists, which VLMEvalKit's scorers read themselves and others' do not.
        index_answers: whether ``answer`` is an option's number from 0 and not its letter.
    """

    columns: dict[str, str] = Field(default={})
    values: dict[str, dict[str, Any]] = Field(default={})
    constants: dict[str, Any] = Field(default={})
    lists: tuple[str, ...] = ()
    index_answers: bool = False

    def complete(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the further columns."""
        row |= self.constants
        for name, own in self.columns.items():
            if name in row:
                continue
            with suppress(KeyError, TypeError):  # what is lacking is told by the scorer or prompt that needs it
                row[name] = own.format_map(row) if "{" in own else row[own]
        for name, translated in self.values.items():
            if name in row:
                row[name] = translated.get(str(row[name]), row[name])
        return row


class Tsv(Layout):
    """VLMEvalKit's ``{name}.tsv``.

    Attributes:
        also: other names under which the same file is found; ``md5`` is not theirs.
        url: where ``{name}.tsv`` is published, ending in a slash.
    """

    name: str
    also: tuple[str, ...] = ()
    md5: str | None = None
    url: str = ""

    def published(self) -> str:
        return f"{self.name}.tsv" + (f" ({self.url}{self.name}.tsv)" if self.url else "")

    def open(self, folders: Iterable[Path], images: Path | None) -> Table | None:
        """The table, or ``None`` where no folder has the file."""
        for path in (folder / f"{name}.tsv" for folder in folders for name in (self.name, *self.also)):
            if path.is_file():
                return TsvTable(path, images=images, md5=self.md5 if path.stem == self.name else None)
        return None


class HuggingFace(Layout):
    """A data set in the layout that lmms-eval reads.

    Attributes:
        paths: its names on the hub, the first one first. A local copy is looked for under ``owner/name`` and ``name``.
        images: columns that hold images.
        pictures: configuration that holds the images (columns ``id`` and ``image``) instead, ``pictures_on`` the
            question's column with the id.
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
        del images  # they are in the table
        for folder in folders:
            for path in self.paths:
                for local in (folder / path, folder / path.split("/")[-1]):
                    # A folder of that name may hold another layout.
                    if any(local.rglob("*.parquet")) or any(local.rglob("*.arrow")):
                        return self._table(str(local))
        return None

    def open_hub(self) -> Table:
        """The data set from the hub, or from the cache of ``datasets``.

        Raises:
            UserError: it cannot be had under any of its names.
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
    """A file whose records belong to the questions, found by the column ``by``. (YAML reads a key ``on`` as true.)"""

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
        files: the question file, or several by group; ``group`` is the column that then says which.
        under, key, fields: how records stand in them (:class:`~data.json_tables.Records`).
        join: annotations and other records to join.
        only: which ids to keep.
        required: columns without which a row is no question of the benchmark.
        image: the image's file name, a pattern of columns.
        folder: the images' folder beside the files, where it has the published name.
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
        rows = [row for row in rows if all(row.get(column) is not None for column in self.required)]
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
    """Anything that training reads (``docs/data.md``): a path, in the data folder or as it is, or a name on the hub."""

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
    """The rows in which each column of ``where`` that the table has holds the given value, or one of those given."""
    wanted = {
        column: {str(value) for value in (values if isinstance(values, list | tuple) else [values])}
        for column, values in where.items()
        if column in table.columns
    }
    if not wanted:
        return table
    rows = [
        number
        for number, row in enumerate(table[i] for i in range(len(table)))
        if all(str(row.get(column)) in values for column, values in wanted.items())
    ]
    if not rows:
        raise UserError(f"{table.name} has no row with {', '.join(f'{key} {value}' for key, value in where.items())}")
    return Selection(table, rows)
