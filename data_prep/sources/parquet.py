"""Parquet files with the images' bytes inside, as Hugging Face data sets have them. Needs the extra `parquet`.

Labels and captions are read when the rows are listed; captions are columns of texts, of lists of texts with or without
weights, or of lists of structs. An image is read when it is asked for, with its whole row group.
"""

from __future__ import annotations

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.listing.base import Entries, Item, Reader, ending, in_one_line, of_parquet
from data_prep.listing.captions import CAPTION_COLUMNS, CaptionKeys, captions_in, of_class, trimmed
from data_prep.listing.classes import Label, NoClass, label_of, settle
from data_prep.listing.files import files_below
from data_prep.listing.img2dataset import is_table
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.splits import of_split
from megapix.errors import InputError

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "cls", "fine_label")
WEIGHT_COLUMN = "caption_weights"
"""Lists of weights, for the captions of a column of lists of texts."""
KIND = "parquet"
HELD_BYTES = 1 << 29
"""Bytes of row groups that one process keeps (two groups at least); the plan lays a group's samples near each other."""


@dataclass(frozen=True)
class ParquetReader(Reader):
    """Images at `item.place` = (file, row group, row, column)."""

    def read(self, item: Item, size: int) -> bytes:
        """The bytes of the image; a null is an error."""
        path, group, row, column = item.place
        rows = _images((path, group, column))
        if row >= len(rows):
            raise ValueError(f"column {column!r} of row group {group} has {len(rows)} rows, fewer than the file says")
        value = rows[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise ValueError("the row holds no image bytes")
        return data


_held: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
"""This process's row groups, the one used longest ago first."""


def _images(key: tuple[str, int, str]) -> Any:
    if key not in _held:
        _held[key] = _load(*key)
        while len(_held) > 2 and sum(column.nbytes for column in _held.values()) > HELD_BYTES:
            _held.popitem(last=False)
    _held.move_to_end(key)
    return _held[key]


def _load(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read_row_group(group, [column]).column(0)
    except of_parquet() as error:
        raise ValueError(f"row group {group} of {path} cannot be read: {in_one_line(error)}") from error


@dataclass(frozen=True)
class Parquet:
    """The rows of one file, or of every .parquet file below a folder, in order."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: ParquetReader = field(default_factory=ParquetReader)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": KIND})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there are parquet files that are not tables of images beside them."""
        return any(not is_table(file) for file in _files(path, Entries()))

    @classmethod
    def open(cls, path: Path, reading: Reading = PLAIN) -> Parquet:
        """List the rows; only labels and captions are read.

        Raises:
            InputError: pyarrow is not installed, a damaged file, no column of images or of --captions, a caption or
                weight that is none, more names than classes have, or several splits without train.
        """
        if importlib.util.find_spec("pyarrow") is None:
            raise InputError(f"source {str(path)!r} needs pyarrow: pip install 'megapix[parquet]'")
        entries = Entries()
        files = _files(path, entries)
        if not files:
            raise InputError(f"source {str(path)!r} holds no parquet file")
        by_name = {_name(path, file): file for file in files}
        chosen, split = of_split(list(by_name), reading.split, entries, f"source {str(path)!r}")
        items: list[Item] = []
        labels: list[Label] = []
        names: tuple[str, ...] | None = None
        for file in map(by_name.__getitem__, chosen):
            try:
                rows, labels_here, names_here = _rows(path, file, reading)
            except of_parquet() as error:
                raise InputError(f"{file}: cannot be read as a parquet file: {in_one_line(error)}") from error
            if names is not None and names_here not in (None, names):
                raise InputError(f"{file}: its class names are not those of the files before it")
            names = names or names_here
            items += rows
            labels += labels_here
        if not items:
            raise InputError(f"source {str(path)!r} holds no rows")
        entries.listed += len(items)
        captioned = bool(reading.keys) or any(item.caption for item in items)
        classes, numbers = settle(labels, reading.classes, captioned, names or ())
        entries.remark(classes.remark)
        items = [item._replace(label=n, fault=why) for item, (n, why) in zip(items, numbers, strict=True)]
        return cls(classes.names, items, about={"kind": KIND, **reading.recorded(), **split}, entries=entries)


def _name(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix() if root.is_dir() else file.name


def _rows(root: Path, file: Path, reading: Reading) -> tuple[list[Item], list[Label], tuple[str, ...] | None]:
    """(the rows, whose labels are not settled yet; these; names of the classes if the file has them)."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        schema = opened.schema_arrow
        image = _column(schema.names, IMAGE_COLUMNS)
        if image is None:
            raise InputError(f"{file}: no column of images ({', '.join(IMAGE_COLUMNS)}); it has {schema.names}")
        label = _column(schema.names, LABEL_COLUMNS)
        columns = _caption_columns(schema, file, reading.keys)
        there = [column for column in reading.columns if column in schema.names]
        name = _name(root, file)
        classes = _class_names(schema, label)
        items: list[Item] = []
        labels: list[Label] = []
        for group in range(opened.num_row_groups):
            wanted = dict.fromkeys((*([label] if label else []), *_caption_names(columns), *there))
            table = opened.read_row_group(group, list(wanted))
            count = opened.metadata.row_group(group).num_rows
            raw = _cells(table, label, f"{file}: row group {group}") if label else [None] * count
            where, chunk = f"{file}: row group {group}", f"{name}/{group}"
            captions = _captions_of_rows(table, columns, where) if columns else []
            known = {column: _cells(table, column, where) for column in there}
            for row, value in enumerate(raw):
                found = _label(value, label or "", classes)
                named = classes[found] if classes and isinstance(found, int) else found
                caption = captions[row] if columns else of_class(named)
                about = reading.chosen({column: cells[row] for column, cells in known.items()})
                items.append(Item(f"{chunk}/{row}", 0, caption, (str(file), group, row, image), chunk, about))
                labels.append(label_of(named, "label") if reading.classes and isinstance(named, str) else found)
    return items, labels, classes


def _label(value: Any, column: str, classes: tuple[str, ...] | None) -> Label:
    found = label_of(value, column)
    if classes and isinstance(found, int) and found >= len(classes):
        return NoClass(f"{column}: the class is {found}, but there are {len(classes)} names of classes")
    return found


def _column(names: list[str], known: tuple[str, ...]) -> str | None:
    return next((name for name in known if name in names), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """The names that Hugging Face's `datasets` stores with a ClassLabel column."""
    try:
        about = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        return tuple(str(name) for name in about["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _files(path: Path, entries: Entries) -> list[Path]:
    """The parquet files; other files below the folder are counted as passed over."""
    if not path.is_dir():
        return [path] if path.suffix == ".parquet" else []
    files = []
    for name in files_below(path, entries):
        if name.endswith(".parquet"):
            files.append(path / name)
        else:
            entries.pass_over(ending(name))
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


class _CaptionColumn(NamedTuple):
    """One column of captions."""

    name: str
    weight: float
    """Of its captions, from --captions."""
    weights: str = ""
    """Column of their own weights; empty if there is none."""


def _caption_columns(schema: Any, file: Path, keys: CaptionKeys) -> list[_CaptionColumn]:
    """Those that `keys` names, or the first that is known by its name; none if there is no such column.

    Raises:
        InputError: a column of `keys` is not there, or it is open whose captions have the weights.
    """
    for key, _ in keys:
        if key not in schema.names:
            raise InputError(f"{file}: --captions names column {key!r}, which is not there; it has {schema.names}")
    known = [(name, 1.0) for name in CAPTION_COLUMNS if name in schema.names][:1]
    columns = [_CaptionColumn(name, weight) for name, weight in keys or known]
    if WEIGHT_COLUMN not in schema.names:
        return columns
    lists = [column.name for column in columns if _holds_lists_of_texts(schema.field(column.name).type)]
    if len(lists) > 1:
        raise InputError(
            f"{file}: column {WEIGHT_COLUMN!r} gives the weights of one column of lists, but --captions names {lists}"
        )
    return [column._replace(weights=WEIGHT_COLUMN if column.name in lists else "") for column in columns]


def _holds_lists_of_texts(kind: Any) -> bool:
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and (types.is_string(kind.value_type) or types.is_large_string(kind.value_type))


def _caption_names(columns: list[_CaptionColumn]) -> list[str]:
    """The columns to read, with those of weights."""
    return [name for column in columns for name in (column.name, column.weights) if name]


def _captions_of_rows(table: Any, columns: list[_CaptionColumn], where: str) -> list[str]:
    """The packed captions of each row.

    Args:
        where: file and row group, for messages.

    Raises:
        InputError: a cell that holds no captions, or a weight that is not a finite number above 0.
    """
    cells = {name: _cells(table, name, where) for name in _caption_names(columns)}
    found = []
    for row in range(table.num_rows):
        captions = []
        for name, weight, weights in columns:
            value = cells[name][row]
            try:
                if weights and value and cells[weights][row] is not None:
                    value = _weighted(value, cells[weights][row])
                captions += captions_in(value, weight)
            except ValueError as error:
                raise InputError(f"{where}, row {row}: {name}: {error}") from error
        found.append(trimmed(captions))
    return found


def _cells(table: Any, name: str, where: str) -> list[Any]:
    try:
        return table.column(name).to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: column {name!r} holds a text that is not UTF-8: {error}") from error


def _weighted(texts: list[Any], weights: list[Any]) -> list[dict[str, Any]]:
    if len(texts) != len(weights):
        raise ValueError(f"{len(texts)} captions, but {len(weights)} in {WEIGHT_COLUMN}; expected as many")
    return [{"text": text, "weight": weight} for text, weight in zip(texts, weights, strict=True)]
