"""Files of features, as `image_features.py` and `text_features.py` write them: what both kinds share.

Each entry of the index has a safetensors file of its own, so any program reads it. Its header says whose features it
holds: format, encoder, data set, name and counts. So a file is told from one of other features by its size and its
first bytes, before a number is read; the numbers have CRCs, which are checked when they are read. Beside the files
lies what lists them, written last.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megapix.errors import InputError
from megapix.files import read_range, size_of
from megapix.shards.storage import Local


def file_name(kind: str, place: int) -> str:
    """Name of an entry's file, by its place in the index's list; `kind` is "features" or "text"."""
    return f"{kind}-{place:06d}.safetensors"


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


# ---------------------------------------------------------------------------------------------------------------------
# What lists the files: it may come from a stranger, and each check raises ValueError
# ---------------------------------------------------------------------------------------------------------------------


def check_format(listed: Any, name: str, version: int) -> None:
    """Check format and version."""
    if (found := (listed["format"], listed["version"])) != (name, version):
        raise ValueError(f"format and version are {found}, expected {(name, version)}")


def check_name(entry: Any, place: int, expected: str) -> None:
    """Check the name of file number `place`: it lies in the folder, and nowhere else."""
    if entry["name"] != expected:
        raise ValueError(f"file {place} is named {entry['name']!r}, expected {expected!r}")


def check_size(entry: Any, size: int, cause: str) -> None:
    """Check that a file is listed with the size that follows from the rest, which `cause` names."""
    if entry["bytes"] != size:
        raise ValueError(f"{entry['name']} has {entry['bytes']!r} bytes, but {cause} {size}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class EntryFiles:
    """Reads ranges of the files; each process needs its own.

    Args:
        samples: of each entry.
        command: what writes such files, for messages.
    """

    def __init__(self, folder: Path, samples: Iterable[int], command: str) -> None:
        self._files, self._command = Local(folder), command
        self._first = np.concatenate([[0], np.cumsum(np.fromiter(samples, np.int64))])

    def find(self, sample: int) -> tuple[int, int]:
        """(place of the entry that holds a sample, its number in there)."""
        place = int(np.searchsorted(self._first, sample, "right")) - 1
        return place, sample - int(self._first[place])

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
