"""img2dataset's table of a shard: NAME.parquet beside NAME.tar or the folder NAME, a row for each image by its key.

Its columns stand in for a sample's JSON where there is none. Other files that img2dataset leaves are NAME_stats.json.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_prep.listing.archives import PACKED, without_ending
from data_prep.listing.base import Entries, ending, in_one_line, of_parquet
from data_prep.listing.captions import CAPTION_COLUMNS
from data_prep.listing.reading import Reading
from megapix.errors import InputError

ENDING = ".parquet"
STATS = "_stats.json"
KEY = "key"
"""Column of the samples' keys."""
READ = (*CAPTION_COLUMNS, "label")


class Rows:
    """The rows of a table, which is looked for and read when a sample first asks for its row."""

    def __init__(self, find: Callable[[], Path | None], reading: Reading) -> None:
        self._find, self._reading = find, reading
        self._rows: dict[str, dict[str, Any]] | None = None
        self._fault = ""

    @property
    def asked(self) -> bool:
        """Whether a sample has asked for its row."""
        return self._rows is not None

    def of(self, key: str) -> dict[str, Any]:
        """The row of a sample, as the members of its JSON would be; empty if there is none.

        Raises:
            ValueError: the table cannot be read. InputError: pyarrow is not installed.
        """
        if self._rows is None:
            path = self._find()
            try:
                self._rows = _read(path, self._reading) if path else {}
            except ValueError as error:
                self._rows, self._fault = {}, str(error)
        if self._fault:
            raise ValueError(self._fault)
        return self._rows.get(key, {})


def beside(path: Path) -> Path | None:
    """The table of a tar file or folder, if there is one."""
    table = path.with_name(table_of(path.name))
    return table if table.is_file() else None


def table_of(name: str) -> str:
    """What the table of a tar file or folder of that name is called."""
    return f"{without_ending(name)}{ENDING}"


def count_others(names: Iterable[str], tars: Iterable[str], entries: Entries) -> None:
    """Count what lies in a folder beside its tar files: their tables as parts, the rest as passed over.

    Args:
        names: of all files there.
        tars: those that are tar files.
    """
    tars = set(tars)
    tables = set(map(table_of, tars))
    for name in names:
        if name in tables:
            entries.part()
        elif name not in tars:
            entries.pass_over(STATS if name.endswith(STATS) else ending(name))


def is_table(path: Path) -> bool:
    """Whether a parquet file is such a table: beside a tar file or folder of its name, with a column of keys."""
    tars = (path.with_suffix(end) for end in (".tar", *PACKED))
    if not (path.with_suffix("").is_dir() or any(tar.is_file() for tar in tars)):
        return False
    if importlib.util.find_spec("pyarrow") is None:
        return True
    import pyarrow.parquet

    try:
        return KEY in pyarrow.parquet.read_schema(path).names
    except of_parquet():
        return True


def _read(path: Path, reading: Reading) -> dict[str, dict[str, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{path} holds what is known of its images, and needs pyarrow: pip install 'megapix[parquet]'")
    import pyarrow.parquet

    wanted = (KEY, *READ, *(key for key, _ in reading.keys), *reading.columns)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = set(file.schema_arrow.names)
            rows = file.read([name for name in dict.fromkeys(wanted) if name in names]).to_pylist()
    except of_parquet() as error:
        raise ValueError(f"{path.name} cannot be read as a parquet file: {in_one_line(error)}") from error
    return {str(row.pop(KEY)): row for row in rows} if KEY in names else {}
