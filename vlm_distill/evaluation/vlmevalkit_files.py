"""Write and read VLMEvalKit's prediction files, ``{model}_{dataset}.xlsx``.

Such a file holds the table's columns except images, and ``prediction``. It is read with the types that pandas infers
for a column, as VLMEvalKit does: "None" and "N/A" are empty, and "007" is 7 if the whole column is numbers.
"""

from __future__ import annotations

import csv
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.errors import UserError

FORMATS = ("xlsx", "tsv")

# Not allowed in XML: control characters except tab and line breaks, lone surrogates, non-characters.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# Excel writes control characters, including the carriage return, as _x000D_, and text that looks like that as
# _x005F_x000D_. VLMEvalKit writes them so, and reads and scores the escaped form.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\ufffe\uffff]")
_SPELLED = re.compile("(_x[0-9a-fA-F]{4}_)")
#: The longest text that an Excel cell holds.
LONGEST = 32_767


def prediction_file(folder: Path, model: str, dataset: str, format: str = "xlsx") -> Path:
    """Return the path where VLMEvalKit looks for a model's predictions on one of its data sets.

    Args:
        model: name or folder of the model; only its last part is used.
        dataset: VLMEvalKit's name.
        format: ``xlsx`` or ``tsv`` (which it reads with ``PRED_FORMAT=tsv``).
    """
    return folder / f"{Path(model).name}_{dataset}.{format}"


def write_prediction_file(path: Path, rows: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> None:
    """Write a prediction file in the format of its suffix.

    Lone surrogates are dropped. Control characters are dropped in ``tsv`` and escaped in Excel (``_x000D_``), where
    texts are also cut after :data:`LONGEST` characters.

    Args:
        rows: the table's rows without images.
        predictions: an answer for each row.

    Raises:
        UserError: the format is not known, or openpyxl is not installed.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "prediction"))
    table: list[list[Any]] = [[*columns, "prediction"]]
    for row, prediction in zip(rows, predictions, strict=True):
        table.append([*map(row.get, columns), prediction])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first, so that a scorer never finds half a file.
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".xlsx":
        _write_excel(partial, table)
    elif path.suffix == ".tsv":
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
            for line in table:
                writer.writerow([_cell(value) for value in line])
    else:
        raise UserError(f"{path}: prediction files are {' or '.join(FORMATS)}")
    partial.replace(path)


def read_prediction_file(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a prediction file, typed as VLMEvalKit reads them.

    Empty cells are ``None``, but an empty prediction is NaN, which VLMEvalKit scores as the text "nan".

    Raises:
        UserError: the file cannot be read or has no column ``index`` or ``prediction``.
    """
    import pandas as pd

    from data.tsv import plain_rows

    if path.suffix not in (".xlsx", ".tsv"):
        raise UserError(f"{path}: prediction files are {' or '.join(FORMATS)}")
    if path.suffix == ".xlsx":
        _openpyxl()
    try:
        frame = pd.read_excel(path) if path.suffix == ".xlsx" else pd.read_csv(path, sep="\t", low_memory=False)
    except Exception as error:  # a broken archive, a missing sheet, a missing file: many kinds
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None
    for column in ("index", "prediction"):
        if column not in frame.columns:
            raise UserError(f"{path} has no column {column!r}; its columns: {', '.join(map(str, frame.columns))}")
    rows = plain_rows(frame)
    for row in rows:
        if row["prediction"] is None:
            row["prediction"] = math.nan
    return rows


def read_back(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return answered rows as VLMEvalKit scores them: written to a prediction file and read back."""
    if not rows:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = prediction_file(Path(folder), "model", "data", default_format())
        write_prediction_file(path, rows, [row["prediction"] for row in rows])
        return read_prediction_file(path)


def default_format() -> str:
    """Return VLMEvalKit's format, ``xlsx``; ``tsv``, which it reads too, if openpyxl is not installed."""
    return "xlsx" if find_spec("openpyxl") else "tsv"


def _write_excel(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    openpyxl = _openpyxl()
    from openpyxl.cell import WriteOnlyCell

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for line in lines:
        cells = []
        for value in line:
            if isinstance(value, str):
                value = _SPELLED.sub(r"_x005F\1", value)
                value = _CONTROL.sub(lambda found: f"_x{ord(found[0]):04X}_", value)
            value = _cell(value)
            cell = WriteOnlyCell(sheet, value[:LONGEST] if isinstance(value, str) else value)
            if isinstance(value, str):
                cell.data_type = "s"  # also "=1+1", which would be a formula, and "#N/A", which would be an error
            cells.append(cell)
        sheet.append(cells)
    book.save(path)


def _cell(value: Any) -> Any:
    """Return a value as a cell holds it: numbers and texts as they are, anything else as its ``repr``."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _ILLEGAL.sub("", value if isinstance(value, str) else repr(value))


def _openpyxl() -> Any:
    try:
        import openpyxl
    except ImportError:
        raise UserError("prediction files for Excel need openpyxl; install vlm-distill[excel]") from None
    return openpyxl
