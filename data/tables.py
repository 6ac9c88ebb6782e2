"""`Table`, a benchmark's questions by index: each row has plain values, and its images are still encoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .conversation import Conversation, ImageSource
from .errors import BadSample, UserError
from .huggingface import without_media
from .image_values import images_of
from .sources import Source

Row = dict[str, Any]


class Table(ABC):
    """Rows by index, ``table[0]`` to ``table[len(table) - 1]``. Holds no open file, so it can be pickled.

    Attributes:
        name: the name in reports.
        columns: names of the columns in the order of the file, that of the images included.
    """

    name: str
    columns: Sequence[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """Return a row's cells without its images; an empty cell is ``None``. Raise ``BadSample`` if it is broken."""

    @abstractmethod
    def images(self, index: int) -> list[ImageSource]:
        """Return the images of a row in order, not decoded. Raise ``BadSample`` if one is missing or broken."""

    def line(self, index: int) -> int:
        """Return the 1-based position of a row in its file, for reports."""
        return index + 1


class RowTable(Table):
    """Rows in memory.

    Args:
        rows: the cells.
        image: returns the images of a row.
    """

    def __init__(self, rows: Sequence[Row], name: str, image: Callable[[Row], list[ImageSource]] | ImageFiles) -> None:
        self.name = name
        self.columns = list(dict.fromkeys(chain.from_iterable(rows)))
        self._rows = rows
        self._image = image

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return dict(self._rows[index])

    def images(self, index: int) -> list[ImageSource]:
        return self._image(self._rows[index])


class ImageFiles:
    """Image paths from a pattern of row cells, such as ``val2014/COCO_val2014_{image_id:012d}.jpg``.

    A row whose cell is empty or missing has no image.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder = folder
        self.pattern = pattern

    def __call__(self, row: Row) -> list[ImageSource]:
        try:
            # Without empty cells, which would make up a path such as "None.jpg", the pattern raises KeyError.
            name = self.pattern.format_map({column: cell for column, cell in row.items() if cell not in (None, "")})
        except KeyError:
            return []
        except (ValueError, AttributeError, IndexError) as error:
            raise BadSample("image name cannot be formed", f"{self.pattern}: {error}") from None
        return [str(self.folder / name)]


class HuggingFaceTable(Table):
    """Rows of a ``datasets.Dataset``, images in columns of their own.

    Args:
        dataset: the data set; its own format and transforms are ignored.
        images: names of the columns that hold a row's images, in order; missing ones are ignored.
        pictures: another data set with the images (columns ``id`` and ``image``), joined on the column ``pictures_on``.
        given: the path or name as the user wrote it, for errors.
    """

    def __init__(
        self, dataset: Any, name: str, images: Sequence[str], *, pictures: Any = None, pictures_on: str = "", given: str
    ) -> None:
        self.name = name
        self.columns = list(dataset.column_names)
        self._images = [column for column in images if column in self.columns]
        if not self._images and pictures is None:
            found = ", ".join(self.columns)
            raise UserError(f"{given} has no image column ({', '.join(images)}); its columns: {found}")
        cells = [column for column in self.columns if column not in self._images]
        self._cells = _PlainTable(dataset.select_columns(cells))
        self._encoded = _PlainTable(dataset.select_columns(self._images)) if self._images else None
        self._pictures, self._picture_index = None, {}
        if pictures is not None:
            for data, column in ((dataset, pictures_on), (pictures, "id"), (pictures, "image")):
                if column not in data.column_names:
                    raise UserError(f"{given} has no column {column!r}, which links questions to their images")
            self._pictures = _PlainTable(pictures.select_columns(["image"]))
            self._picture_index = {str(key): index for index, key in enumerate(pictures["id"])}
            self._on = pictures_on

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> Row:
        return self._cells[range(len(self))[index]]

    def images(self, index: int) -> list[ImageSource]:
        index = range(len(self))[index]
        if self._pictures is not None:
            key = str(self[index][self._on])
            if key not in self._picture_index:
                raise BadSample("image not found", f"no picture {key}")
            return images_of(self._pictures[self._picture_index[key]]["image"], Path())
        encoded = self._encoded[index] if self._encoded is not None else {}
        return images_of([encoded[column] for column in self._images], Path())


class _PlainTable:
    """Rows of a data set as plain values, with images as stored."""

    def __init__(self, dataset: Any) -> None:
        self._features = without_media(dataset.features)
        self._arrow = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._arrow)

    def __getitem__(self, index: int) -> Row:
        return dict(self._features.decode_example(self._arrow[index].to_pylist()[0]))


class SourceTable(Table):
    """Any source of conversations as a table: ``question``, ``answers`` and the conversation's metadata."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.columns = ["index", "question", "answers"]
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def conversation(self, index: int) -> Conversation:
        """Return the conversation behind a row."""
        return self.source[index]

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        conversation = self.source[index]
        answers = conversation.references
        metadata: Mapping[str, Any] = conversation.metadata
        return {"index": index, **metadata, "question": conversation.question, "answers": answers}

    def images(self, index: int) -> list[ImageSource]:
        return list(self.source[index].prompt().images)

    def line(self, index: int) -> int:
        return self.source.line(index)


class Selection(Table):
    """Some rows of a table, in the given order."""

    def __init__(self, table: Table, rows: Sequence[int]) -> None:
        self.name = table.name
        self.columns = table.columns
        self._table = table
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._table[self._rows[index]]

    def images(self, index: int) -> list[ImageSource]:
        return self._table.images(self._rows[index])

    def line(self, index: int) -> int:
        return self._table.line(self._rows[index])
