"""A disk that fails for a while: what the operating system answers to opening, reading and listing certain files."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Failing:
    """Fails what touches a path that holds `part`: `times` times, after the first `after` of them."""

    part: str
    times: int = 1
    error: int = 5
    after: int = 0
    seen: int = 0
    """How often such a path was touched."""

    def touch(self, path: object) -> None:
        """Raise the error, if it is time."""
        if self.part not in str(path):
            return
        self.seen += 1
        if self.after < self.seen <= self.after + self.times:
            raise OSError(self.error, os.strerror(self.error), str(path))


@contextmanager
def failing(disk: Failing) -> Iterator[Failing]:
    """While it lasts, `open`, `os.open`, `os.stat`, `os.listdir` and `os.pread` fail as `disk` says."""

    def broken(call: Callable[..., Any]) -> Callable[..., Any]:
        def of_path(path: Any, *args: Any, **kwargs: Any) -> Any:
            disk.touch(path)
            return call(path, *args, **kwargs)

        return of_path

    def pread(file: int, size: int, offset: int) -> bytes:
        disk.touch(os.readlink(f"/proc/self/fd/{file}"))
        return real["pread"](file, size, offset)

    real: dict[str, Any] = {name: getattr(os, name) for name in ("open", "stat", "listdir", "pread")}
    opened = builtins.open
    for name in ("open", "stat", "listdir"):
        setattr(os, name, broken(real[name]))
    os.pread = pread
    builtins.open = io.open = broken(opened)
    try:
        yield disk
    finally:
        for name, call in real.items():
            setattr(os, name, call)
        builtins.open = io.open = opened
