"""Files of a local folder."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from megapix.outage import persist

MAX_OPEN = 64
"""Open files of one process."""


class Local:
    """Files below a folder."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._files: OrderedDict[str, int] = OrderedDict()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def where(self, name: str) -> str:
        """What to call a file in messages."""
        return str(self.base / name)

    def names(self) -> list[str]:
        """Files of the folder, in order; StorageError, OSError."""
        return persist(self.base, lambda: sorted(entry.name for entry in os.scandir(self.base) if entry.is_file()))

    def size(self, name: str) -> int:
        """Bytes of a file; StorageError, OSError."""
        return self.state(name)[0]

    def state(self, name: str) -> tuple[int, str]:
        """(bytes, what changes with the content: time of modification in ns); StorageError, OSError."""
        found = persist(self.base / name, lambda: os.stat(self.base / name))
        return found.st_size, str(found.st_mtime_ns)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Those bytes, or fewer where the file ends.

        Raises:
            StorageError: they cannot be read now. OSError: the file is not there, or may not be read.
        """
        return persist(self.base / name, lambda: self._read(name, offset, size))

    def _read(self, name: str, offset: int, size: int) -> bytes:
        if name in self._files:
            self._files.move_to_end(name)
        else:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[name] = os.open(self.base / name, os.O_RDONLY)
        try:
            return os.pread(self._files[name], size, offset)
        except OSError:
            os.close(self._files.pop(name))  # a stale handle stays so: the next try opens the file again
            raise
