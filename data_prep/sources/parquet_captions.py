"""The captions of parquet rows: columns of texts, of lists of texts with or without weights, of lists of structs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from data_prep.captions import CaptionKeys, captions_in, packed
from megapix.errors import InputError

CAPTION_COLUMNS = ("caption", "text", "txt", "captions")
"""The first of these that there is holds the captions, without --captions."""
WEIGHT_COLUMN = "caption_weights"
"""Lists of weights, for the captions of a column of lists of texts."""


class CaptionColumn(NamedTuple):
    """One column of captions."""

    name: str
    weight: float
    """Of its captions, from --captions."""
    weights: str = ""
    """Column of their own weights; empty if there is none."""


def caption_columns(schema: Any, file: Path, keys: CaptionKeys) -> list[CaptionColumn]:
    """Those that `keys` names, or the first that is known by its name; none if there is no such column.

    Raises:
        InputError: a column of `keys` is not there, or it is open whose captions have the weights.
    """
    for key, _ in keys:
        if key not in schema.names:
            raise InputError(f"{file}: --captions names column {key!r}, which is not there; it has {schema.names}")
    known = [(name, 1.0) for name in CAPTION_COLUMNS if name in schema.names][:1]
    columns = [CaptionColumn(name, weight) for name, weight in keys or known]
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


def names_of(columns: list[CaptionColumn]) -> list[str]:
    """The columns to read, with those of weights."""
    return [name for column in columns for name in (column.name, column.weights) if name]


def captions_of_rows(table: Any, columns: list[CaptionColumn], where: str) -> list[str]:
    """The packed captions of each row.

    Args:
        where: file and row group, for messages.

    Raises:
        InputError: a cell that holds no captions, or a weight that is not a finite number above 0.
    """
    cells = {name: _cells(table, name, where) for name in names_of(columns)}
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
        found.append(packed(captions))
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
