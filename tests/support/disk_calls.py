"""What a program asks of the disk, in order: files and folders that are synced, and names that move."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest


class DiskCalls:
    """Records the real calls below `root` from here on.

    Attributes:
        order: "sync NAME" and "NAME -> NAME", relative to `root` and without the numbers of processes.
        synced: name -> what was in a file when it was synced, or the entries of a folder.
        moved: the new name of each that moved, and whether all that it held then had been synced.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.order: list[str] = []
        self.synced: dict[str, object] = {}
        self.moved: list[tuple[str, bool]] = []
        self._root = root.resolve()
        fsync = os.fsync

        def sync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.order.append(f"sync {self._name(path)}")
            self.synced[self._name(path)] = _held(path)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._moving(getattr(os, name)))

    def _moving(self, move: Any) -> Any:
        def moved(old: Any, new: Any) -> None:
            self.order.append(f"{self._name(Path(old))} -> {self._name(Path(new))}")
            self.moved.append((self._name(Path(new)), self._whole(Path(old))))
            move(old, new)
            for name in [name for name in self.synced if Path(name).is_relative_to(self._name(Path(old)))]:
                self.synced[name.replace(self._name(Path(old)), self._name(Path(new)), 1)] = self.synced.pop(name)

        return moved

    def _name(self, path: Path) -> str:
        name = str(path.resolve().relative_to(self._root))
        return re.sub(r"\.\d+-[0-9a-f]+\.tmp$", ".tmp", name)

    def _whole(self, path: Path) -> bool:
        here = self.synced.get(self._name(path)) == _held(path)
        return here and (path.is_file() or all(map(self._whole, path.iterdir())))


def _held(path: Path) -> object:
    return path.read_bytes() if path.is_file() else sorted(entry.name for entry in path.iterdir())
