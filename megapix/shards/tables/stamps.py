"""What was checked once need not be checked by each process: one stamp for each folder, of this user on this node.

    CACHE/megapix/checked/FOLDER.json     what was checked, and the size, time and inode that its files had then
    CACHE/megapix/checked/FOLDER.lock     held (flock) by the process that checks; the others wait, and see the stamp

CACHE is XDG_CACHE_HOME or ~/.cache, and where nothing can be written there, a folder of the user's own in /tmp. So data
folders stay what was prepared, byte for byte, and may be read-only. A file that changes later is checked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megapix.files import locked, write_atomic
from megapix.outage import persist

RACY = 2.0
"""Seconds: what was written so shortly before it was checked may change once more within the same tick of its clock."""
KEPT = 16
"""Checks of a folder that are remembered."""

State = dict[str, list[int]]
"""Path -> size, time of modification in ns, inode."""


def state_of(paths: Iterable[Path]) -> State:
    """How those files or folders are now.

    Raises:
        StorageError: one cannot be looked at now. OSError: it is not there.
    """
    found = State()
    for path in paths:
        about = persist(path, lambda path=path: os.stat(path))  # type: ignore[misc]
        found[str(path)] = [0 if stat.S_ISDIR(about.st_mode) else about.st_size, about.st_mtime_ns, about.st_ino]
    return found


def once(folder: Path, of: str, check: Callable[[], State | None], paths: Iterable[Path] = ()) -> None:
    """Check something of a folder, unless it was checked and nothing has changed.

    Args:
        of: what is checked, with the hash of all that it is checked against.
        check: raises if it is wrong; returns what else of the disk it has seen.
        paths: that are read.

    Raises:
        StorageError, OSError: a path cannot be looked at.
    """
    before, place = state_of(paths), _place(folder)
    if place is None:
        check()
        return
    if _stamped(place, of, before):
        return
    with _alone(place.with_suffix(".lock")):
        if _stamped(place, of, before):  # another process was first
            return
        start = time.time()
        state = before | (check() or {})
        if all(changed / 1e9 < start - RACY for _, changed, _ in state.values()):
            kept = dict(list(_read(place).items())[-KEPT:])
            with suppress(OSError):
                write_atomic(place, json.dumps(kept | {of: state}).encode())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock, if the file system has any."""
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(locked(path))
        yield


def _stamped(place: Path, of: str, before: State) -> bool:
    known = _read(place).get(of)
    with suppress(OSError):
        return known is not None and before.items() <= known.items() and state_of(map(Path, known)) == known
    return False


def _read(place: Path) -> dict[str, State]:
    try:
        stamp = json.loads(place.read_bytes())
        return {
            str(of): {str(path): [int(number) for number in state] for path, state in known.items()}
            for of, known in stamp.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _place(folder: Path) -> Path | None:
    """The stamp of a folder; None where none can be kept."""
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for home in (Path(cache) / "megapix", Path(tempfile.gettempdir()) / f"megapix-{os.getuid()}"):
        with suppress(OSError):
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = home.lstat()
            if about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(home, os.W_OK):
                (home / "checked").mkdir(exist_ok=True)
                return home / "checked" / f"{name}.json"
    return None
