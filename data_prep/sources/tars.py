"""Images inside uncompressed tar files, found once by their headers and then read by offset."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep.sources.base import Entries, Item
from megapix.errors import InputError
from megapix.shards.index import TAR_BLOCK


@dataclass(frozen=True)
class TarReader:
    """Images at `item.place` = (tar file, offset, size)."""

    def read(self, item: Item, size: int) -> bytes:
        """The member's bytes."""
        path, offset, length = item.place
        with open(path, "rb") as file:
            return os.pread(file.fileno(), length, offset)


def members(path: Path, entries: Entries, offset: int = 0, end: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of each regular file of the tar at `path`, or of one nested in it at `offset`;
    links and devices are counted in `entries` as passed over, folders are no entries.

    Raises:
        InputError: not a tar file, cut short, with a damaged header, or with something after its end.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.size < 0:
                        raise InputError(f"{path}: member {member.name!r} has a size of {member.size}")
                    # offset_data counts from the start of the file object, which is the outer file.
                    if member.isfile():
                        yield member.name, member.offset_data, member.size
                    elif not member.isdir():
                        entries.pass_over("link" if member.islnk() or member.issym() else "no file")
                    tar.members = []  # type: ignore[attr-defined]  # keep memory flat over millions of members
                    if end is not None and file.tell() >= end:
                        break
                _check_end(path, file, tar.offset, end if end is not None else os.fstat(file.fileno()).st_size)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: cannot be read as an uncompressed tar file: {error}") from error


def _check_end(path: Path, file: BinaryIO, offset: int, end: int) -> None:
    """tarfile takes a damaged header, or the end of a cut file, for the end; a real end is a block of zeros."""
    file.seek(offset)
    block = file.read(min(TAR_BLOCK, max(0, end - offset)))
    if len(block) < TAR_BLOCK:
        raise InputError(f"{path}: cut short at byte {offset}: the end mark of a tar file is missing")
    if any(block):
        raise InputError(f"{path}: the tar header at byte {offset} is damaged")
    while file.tell() < end and (rest := file.read(min(1 << 20, end - file.tell()))):
        if any(rest):
            raise InputError(
                f"{path}: there is something after the end mark at byte {offset}, perhaps another tar file"
            )
