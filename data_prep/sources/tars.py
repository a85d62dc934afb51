"""Images inside uncompressed tar files, found once by their headers and then read by offset."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.source import Item
from megapix.errors import InputError


@dataclass(frozen=True)
class TarReader:
    """Images at `item.place` = (tar file, offset, size)."""

    def read(self, item: Item, size: int) -> bytes:
        """The member's bytes."""
        path, offset, length = item.place
        with open(path, "rb") as file:
            return os.pread(file.fileno(), length, offset)


def members(path: Path, offset: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of each regular file of the tar at `path`, or of one nested in it at `offset`.

    Raises:
        InputError: not a tar file, or truncated.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    # offset_data counts from the start of the file object, which is the outer file.
                    if member.isfile():
                        yield member.name, member.offset_data, member.size
                    tar.members = []  # type: ignore[attr-defined]  # keep memory flat over millions of members
                    if end is not None and file.tell() >= end:
                        return
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: cannot be read as an uncompressed tar file: {error}") from error
