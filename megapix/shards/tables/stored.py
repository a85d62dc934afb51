"""The bytes of a binary table, in its file or in memory, with a header that tells it from another one.

Nothing is held of a large table. It is read, and not looked up in mapped memory, where an error of the disk would end
the process by SIGBUS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from megapix.errors import InputError
from megapix.files import read_range, size_of
from megapix.shards.storage import Local

SMALL = 4 << 20
"""Bytes of a table that is held as a whole, for quick reads: 50,000 tar files."""


class Stored:
    """A table's bytes.

    Args:
        table: its file, or all of it.
        header: bytes that it begins with, which no other table has: a file that has others later is another table.

    Raises:
        InputError, StorageError: it cannot be read.
    """

    def __init__(self, table: Path | bytes, header: int) -> None:
        self._table = table
        self._opened: bytes | Local | None = None if isinstance(table, Path) else table
        self.header = b""
        self.header = self.read(0, header)

    @property
    def path(self) -> Path | None:
        """The file that it lies in; None in memory."""
        return self._table if isinstance(self._table, Path) else None

    @cached_property
    def size(self) -> int:
        """Bytes of the table."""
        return len(self._table) if isinstance(self._table, bytes) else size_of(self._table) or 0

    def read(self, start: int, size: int) -> bytes:
        """Those bytes, or fewer where it ends.

        Raises:
            InputError: it may not be read, or another table has come to its place. StorageError: it cannot be read now.
        """
        try:
            if self._opened is None:
                self._opened = self._open()
            if isinstance(self._opened, bytes):
                return self._opened[start : start + size]
            assert isinstance(self._table, Path)
            return self._opened.read(self._table.name, start, size)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def blocks(self) -> Iterator[bytes]:
        """All of it, in blocks."""
        for start in range(0, self.size, SMALL):
            yield self.read(start, min(SMALL, self.size - start))

    @cached_property
    def sha256(self) -> str:
        """Hash of the table, in hexadecimal."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()

    def _open(self) -> bytes | Local:
        """Each process opens the table for itself."""
        assert isinstance(self._table, Path)
        whole = self.size <= SMALL
        opened = read_range(self._table, 0, self.size + 1) if whole else Local(self._table.parent)
        begins = opened if isinstance(opened, bytes) else opened.read(self._table.name, 0, len(self.header))
        if not begins.startswith(self.header):
            raise InputError(f"{self._table} was written again while it is in use")
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None if isinstance(self._table, Path) else self._table}
