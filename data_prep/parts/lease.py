"""A lock on a file system of many machines, where `flock` may be known to one of them alone.

It is a file that one process has created, and whose time it renews. Who sees that time stand still takes the lock over.
What is done under it must also be right if, after an outage, two do it at once.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megapix.files import write_new

RENEWED, STALE = 5.0, 60.0
"""Seconds between renewals, and without one until the holder counts as dead."""


_held: set[str] = set()
"""Tokens of this process's locks."""


@contextmanager
def lease(path: Path, patience: float = 0.0) -> Iterator[str]:
    """Hold the lock at `path`; gives the name of the process that holds it already, or an empty text: it is held.

    A holder on this machine whose process has ended is seen at once.

    Args:
        patience: seconds for which another holder is watched; one that renews nothing for STALE of them is dead.

    Raises:
        OSError: nothing can be written there.
    """
    me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
    data = json.dumps(me).encode()
    end, seen, since = time.monotonic() + patience, (b"", 0), time.monotonic()
    while not write_new(path, data):
        there = _seen(path)
        if there != seen:
            seen, since = there, time.monotonic()
        if not there[0]:
            continue  # it was released just now
        if _has_ended(there[0]) or time.monotonic() - since >= STALE:
            _take_away(path, there[0])
        elif time.monotonic() >= end:
            yield _name(there[0])
            return
        else:
            time.sleep(0.2)
    _held.add(me["token"])
    released = threading.Event()

    def renew() -> None:
        while not released.wait(RENEWED):
            with suppress(OSError):
                os.utime(path)

    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()
    try:
        yield ""
    finally:
        released.set()
        renewing.join()
        if _seen(path)[0] == data:
            path.unlink(missing_ok=True)


def _seen(path: Path) -> tuple[bytes, int]:
    """Its content and time; opened, since NFS shows the time of a path as it was up to a minute ago."""
    try:
        with open(path, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return b"", 0


def _take_away(path: Path, stale: bytes) -> None:
    """Remove the lock of a dead holder; one that another process has just put in its place goes back."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if aside.read_bytes() != stale:
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _has_ended(data: bytes) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    try:
        holder = json.loads(data)
        if holder["host"] != socket.gethostname():
            return False
        if holder["pid"] == os.getpid():  # a container that was started again, as the same process of the same name
            return holder["token"] not in _held
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return False


def _name(data: bytes) -> str:
    try:
        holder = json.loads(data)
        return f"process {holder['pid']} of {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
