"""Metadata files beside images, as Hugging Face's `imagefolder` has them: metadata.jsonl, .csv or .parquet.

Each line tells of one image, whose name, relative to the metadata file, is in the column `file_name` or `…_file_name`.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.listing.base import in_one_line, of_parquet
from data_prep.listing.captions import LARGEST_TEXT, json_object
from megapix.errors import InputError
from megapix.text import text_of

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
DELIMITERS = (",", ";", "\t")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
"""Numbers as JSON writes them: 007 and 1,5 are texts."""
LONGEST_NUMBER = 40
"""Characters; what is longer is a text."""


class Line(NamedTuple):
    """One line of a metadata file."""

    number: int
    """From 1, the header counted."""
    values: dict[str, Any]
    """Column -> value; None where there is none."""
    fault: str = ""
    """Why it cannot be read."""


class Table(NamedTuple):
    """A metadata file."""

    columns: tuple[str, ...]
    lines: list[Line]


def is_metadata(name: str) -> bool:
    """Whether a file has the name of a metadata file, in any case."""
    return name.rpartition("/")[2].lower() in NAMES


def image_column(columns: Sequence[str]) -> str:
    """The column that names the images; empty if there is none, or several and none of them is `file_name`."""
    if FILE_NAME in columns:
        return FILE_NAME
    named = [column for column in columns if column.endswith(f"_{FILE_NAME}")]
    return named[0] if len(named) == 1 else ""


def read(path: Path) -> Table:
    """Read a metadata file.

    Raises:
        InputError: it cannot be read, is damaged, or needs pyarrow, which is not installed.
    """
    try:
        if path.suffix.lower() == ".parquet":
            return _parquet(path)
        text = text_of(path.read_bytes())
        return _jsonl(text) if path.suffix.lower() == ".jsonl" else _csv(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _jsonl(text: str) -> Table:
    lines = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            lines.append(Line(number, json_object(line)))
            columns |= dict.fromkeys(lines[-1].values)
        except ValueError as error:
            lines.append(Line(number, {}, str(error)))
    return Table(tuple(columns), lines)


def _csv(text: str) -> Table:
    """By the delimiter with which the header names the images; a quoted cell may hold delimiters and line ends."""
    csv.field_size_limit(LARGEST_TEXT)
    headers = {delimiter: _header(text, delimiter) for delimiter in DELIMITERS}
    delimiter = next((delimiter for delimiter in DELIMITERS if image_column(headers[delimiter])), DELIMITERS[0])
    columns, lines = headers[delimiter], list[Line]()
    names = image_column(columns)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    end = 0
    try:
        for cells in rows:
            number, end = end + 1, rows.line_num
            if not any(cell.strip() for cell in cells) or [cell.strip() for cell in cells] == columns:
                continue
            more = [cell for cell in cells[len(columns) :] if cell.strip()]
            values = {
                column: cell if column == names else _cell(cell) for column, cell in zip(columns, cells, strict=False)
            }
            fault = f"has {len(cells)} cells, but the header {len(columns)}" if more else ""
            lines.append(Line(number, dict.fromkeys(columns) | values, fault))
    except csv.Error as error:
        raise ValueError(f"line {end + 1}: {error}") from error
    return Table(tuple(columns), lines)


def _header(text: str, delimiter: str) -> list[str]:
    """The first line that is not blank, by this delimiter."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return next(([cell.strip() for cell in cells] for cells in rows if any(cell.strip() for cell in cells)), [])


def _cell(text: str) -> Any:
    """What a cell holds: None, a number where it is written as one, or its text."""
    stripped = text.strip()
    if stripped.lower() in ("", "nan"):
        return None
    return json.loads(stripped) if len(stripped) < LONGEST_NUMBER and NUMBER.fullmatch(stripped) else text


def _parquet(path: Path) -> Table:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path} needs pyarrow: pip install 'megapix[parquet]'")
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            rows = file.read().to_pylist()
    except of_parquet() as error:
        raise ValueError(f"cannot be read as a parquet file: {in_one_line(error)}") from error
    return Table(columns, [Line(number, row) for number, row in enumerate(rows, 1)])
