"""Files of features, as `image_features.py` and `text_features.py` write them: what both kinds share.

Each entry of the index has a safetensors file of its own, so any program reads it. Its header says whose features it
holds: format, encoder, data set, name and counts. So a file is told from one of other features by its size and its
first bytes, before a number is read; the numbers have CRCs, which are checked when they are read. Beside the files
lie a table of them (`tables/files.py`), and a small manifest in JSON that names it with its hash, written last.

A process that opens features looks at the manifest and the table's first bytes. The whole table and every file are
looked at once on a node, and again where a file has come to the folder or gone; one that changes in its place is found
when it is read. In manifests of version 1 stand the files themselves, and they are read, too.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from megapix.errors import InputError
from megapix.files import read_range, sha256_of, size_of, whole_file
from megapix.shards.index import Index, as_count, as_sha256
from megapix.shards.storage import Local
from megapix.shards.tables.files import Files, Kind
from megapix.shards.tables.stamps import State, once, state_of

VERSION, LISTED_VERSION = 2, 1
"""Of both kinds of manifests; the second has a list of the files in place of the table's name."""

F = TypeVar("F", bound=tuple[Any, ...])


class StoredFeatures(ABC):
    """The features of a data set, of either kind: a dataclass with these attributes."""

    kind: ClassVar[Kind[Any]]
    folder: Path
    """Where they lie."""
    files: Sequence[Any]
    """One for each entry of the index; a table (`Files`), whatever they were given as."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", Files.of(self.kind, self.origin, self.files))

    @property
    @abstractmethod
    def origin(self) -> str:
        """SHA-256 of what the features are of."""

    @abstractmethod
    def header(self, file: Any) -> bytes:
        """The first bytes of a file, which say whose features it holds."""

    @abstractmethod
    def bytes_behind(self, file: Any) -> int:
        """Bytes of a file behind its header."""

    @property
    def table(self) -> Files[Any]:
        """The files as a table."""
        assert isinstance(self.files, Files)
        return self.files

    @property
    def all_files(self) -> Iterable[Any]:
        """Those, and any that is of no entry."""
        return self.table

    def bytes_of(self, file: Any) -> int:
        """Size of a whole file."""
        return len(self.header(file)) + self.bytes_behind(file)

    def fault(self, file: Any) -> str:
        """What is wrong with a file, by its size and its first bytes; empty if nothing is."""
        begins = self.header(file)
        size = len(begins) + self.bytes_behind(file)
        return features_fault(self.folder / file.name, begins, size, self.kind.listed_in)


def features_fault(path: Path, header: bytes, size: int, listed_in: str) -> str:
    """What is wrong with a file of features, by its size and its first bytes; empty if nothing is. StorageError if it
    cannot be read now.

    Args:
        header: what it begins with.
        size: bytes that it has.
        listed_in: name of the file that says so.
    """
    try:
        if (there := size_of(path)) is None:
            return f"{path} is missing"
        found = read_range(path, 0, len(header))
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    if there != size:
        return f"{path} has {there} bytes, expected {size}"
    return "" if found == header else f"{path} holds other features than {listed_in} says"


def table_fault(features: StoredFeatures, index: Index) -> str:
    """What is wrong with the table of files, all of which is read; empty if nothing is. StorageError if it cannot be
    read now."""
    table = features.table
    if table.path and (found := sha256_of(table.path)) != table.sha256:
        return f"{table.path} has sha256 {found[:16]}…, but {table.kind.listed_in} lists {table.sha256[:16]}…"
    fault = table.fault(index.table.samples)
    return fault and f"{table.path or features.folder / table.kind.listed_in}: {fault}"


def faults(features: StoredFeatures, index: Index) -> Iterator[str]:
    """What is wrong with the table, and with each file by its size and its first bytes; looks at every file."""
    if fault := table_fault(features, index):
        yield fault
        return
    yield from filter(None, map(features.fault, features.all_files))


def check_files(features: StoredFeatures, index: Index) -> None:
    """Check that there are none of the `faults`; once on a node, until a file changes (`tables/stamps.py`).

    Raises:
        InputError: the first of them. StorageError: a file cannot be read now.
    """
    folder, table = features.folder, features.table

    def check() -> State:
        before = state_of([folder])
        for fault in faults(features, index):
            raise InputError(f"{fault}; {again(table.kind)}")
        return before

    once(folder, f"{table.kind.name}: {table.sha256} {index.identity}", check, [table.path] if table.path else [])


def again(kind: Kind[Any]) -> str:
    """What helps against a fault."""
    return f"run its '{kind.command}' command again"


def write_table(folder: Path, files: Files[Any]) -> None:
    """Write the table of files, whole or not at all; OSError if that fails."""
    with whole_file(folder / files.kind.table) as out:
        out.writelines(files.blocks())


# ---------------------------------------------------------------------------------------------------------------------
# What lists the files: it may come from a stranger, and each check raises ValueError
# ---------------------------------------------------------------------------------------------------------------------


def listing(files: Files[Any]) -> dict[str, Any]:
    """What a manifest says of the table."""
    return {"count": len(files), "name": files.kind.table, "sha256": files.sha256}


def listed_table(folder: Path, kind: Kind[F], origin: str, about: Any) -> Files[F]:
    """The table that a manifest names; reads its first bytes.

    Args:
        origin: SHA-256 of what the features are of.

    Raises:
        InputError: it is missing or damaged, or another one.
    """
    check_name(about, kind.table)
    count, sha256, path = as_count(about["count"]), as_sha256(about["sha256"]), folder / kind.table
    if size_of(path) is None:
        raise InputError(f"{path} is missing, but {folder / kind.listed_in} needs it; {again(kind)}")
    try:
        files = Files(kind, path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', '') or error}; {again(kind)}") from error
    if (len(files), files.origin) != (count, origin):
        raise InputError(f"{path} is of other features than {folder / kind.listed_in} says; {again(kind)}")
    files.sha256 = sha256  # checked by `check_files`, once on a node
    return files


def check_format(listed: Any, name: str) -> bool:
    """Check format and version; whether the files stand in the manifest."""
    found = listed["format"], listed["version"]
    if found not in ((name, VERSION), (name, LISTED_VERSION)):
        raise ValueError(f"format and version are {found}, expected {(name, VERSION)}")
    return bool(listed["version"] == LISTED_VERSION)


def check_name(entry: Any, expected: str) -> None:
    """Check the name of a file: it lies in the folder, and nowhere else."""
    if entry["name"] != expected:
        raise ValueError(f"a file is named {entry['name']!r}, expected {expected!r}")


def check_size(entry: Any, size: int, cause: str) -> None:
    """Check that a file is listed with the size that follows from the rest, which `cause` names."""
    if entry["bytes"] != size:
        raise ValueError(f"{entry['name']} has {entry['bytes']!r} bytes, but {cause} {size}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class EntryFiles:
    """Reads ranges of the files; each process needs its own."""

    def __init__(self, folder: Path, kind: Kind[Any]) -> None:
        self._files, self._command = Local(folder), kind.command

    def where(self, name: str) -> str:
        """What to call a file in messages."""
        return self._files.where(name)

    def read(self, name: str, start: int, size: int) -> bytes:
        """Those bytes of a file, or fewer where it ends; InputError if they may not, StorageError if not yet."""
        try:
            return self._files.read(name, start, size)
        except OSError as error:
            raise InputError(f"{self.where(name)}: cannot be read: {error.strerror or error}") from error

    def read_checked(self, name: str, start: int, size: int, crc: int, shown: str) -> bytes:
        """Those bytes, which have that CRC-32; `shown` is what they are.

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        data = self.read(name, start, size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise self.not_written(name, shown)
        return data

    def not_written(self, name: str, shown: str) -> InputError:
        """The error for what is not as it was written."""
        return InputError(
            f"{self.where(name)}: {shown} are not those that were written; delete the file and run its "
            f"'{self._command}' command again"
        )
