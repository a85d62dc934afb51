"""The folder of a run's checkpoints: names, `latest`, and the marks and read locks that keep one from removal."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from megapix.checkpoint.manifest import STATE_NAME, Counters
from megapix.errors import InputError, StorageError
from megapix.files import is_there, names_in, read_bytes, size_of, write_atomic
from megapix.outage import persist

LATEST_NAME = "latest"
OLD = ".old"
"""Suffix of a checkpoint while another of the same name replaces it."""
KEEP_NAME, HEALTHY_NAME = "KEEP", "HEALTHY"
"""Files that keep the checkpoint they lie in from removal: KEEP is a person's, HEALTHY the spike sentinel's."""
COMMITTING_NAME = "COMMITTING"
"""File in a checkpoint until `latest` names it; holds the name that `latest` has until then."""


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def name_of(counters: Counters) -> str:
    """Name of the checkpoint at these counters."""
    return f"images-{counters.images_seen:012d}"


def complete(run: Path) -> list[Path]:
    """The checkpoints that were committed, oldest first. A name with a suffix is none, but for NAME.old without a NAME:
    a process was killed while it replaced it.

    Raises:
        StorageError: the folder cannot be read now.
    """
    parent = checkpoints_of(run)
    named = (parent / name for name in names_in(parent) if name.startswith("images-"))
    folders = {path for path in named if size_of(path / STATE_NAME) is not None}
    return sorted(p for p in folders if not p.suffix or (p.suffix == OLD and p.with_suffix("") not in folders))


def point_to(folder: Path) -> None:
    """Make `latest` name a checkpoint."""
    write_atomic(folder.parent / LATEST_NAME, f"{folder.name}\n".encode())


def latest(run: Path, minutes: float | None = None) -> Path | None:
    """The checkpoint that `latest` names, be it there or not (or its NAME.old, as in `complete`); None without one.

    Args:
        minutes: as long as that it is tried again, in place of the process's own patience.

    Raises:
        StorageError: it cannot be read now.
    """
    pointer = checkpoints_of(run) / LATEST_NAME
    try:
        name = read_bytes(pointer, minutes).decode(errors="replace").strip()
    except OSError:
        return None
    named = pointer.parent / (Path(name).name or "(nothing)")
    left = named.with_name(named.name + OLD)
    return left if is_there(left, minutes) and not is_there(named, minutes) else named


def committing(run: Path) -> Path | None:
    """The newest checkpoint, if its process died when it was complete, but before `latest` was moved to it; None
    otherwise, and if `latest` has been moved since: a person's choice stands.

    Raises:
        StorageError: as `latest`.
    """
    named, there = latest(run), complete(run)
    if not (named and there and there[-1] > named and is_there(there[-1] / COMMITTING_NAME)):
        return None
    before = read_bytes(there[-1] / COMMITTING_NAME).decode().strip()
    return there[-1] if before == named.name else None


def protect(run: Path, folder: Path) -> None:
    """Mark a checkpoint as the last healthy one, which stays; the mark moves there from any other.

    Raises:
        OSError: the file system refuses.
    """
    write_atomic(folder / HEALTHY_NAME, b"The last checkpoint before a spike; it stays while this file is here.\n")
    for other in complete(run):
        if other != folder:
            (other / HEALTHY_NAME).unlink(missing_ok=True)


def protected(folder: Path) -> bool:
    """Whether a mark keeps this checkpoint."""
    return any(is_there(folder / name) for name in (KEEP_NAME, HEALTHY_NAME))


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Hold a read lock on a checkpoint: a run's retention leaves it alone (`unread`).

    Raises:
        InputError: it is not there any more, or may not be read. StorageError: it cannot be read now.
    """
    with ExitStack() as stack:
        for path in _locked_file(folder):
            try:
                file = stack.enter_context(persist(path, partial(open, path, "rb")))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            _lock(file.fileno(), fcntl.LOCK_SH)
        yield


def unread(folder: Path) -> bool:
    """Whether nobody holds a read lock on this checkpoint (`reading`); false too if that cannot be checked."""
    try:
        for path in _locked_file(folder, minutes=0):
            with open(path, "r+b") as file:  # over NFS only a file that is open for writing can be locked exclusively
                return _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, StorageError):
        return False
    return True


def _locked_file(folder: Path, minutes: float | None = None) -> list[Path]:
    """The file whose lock stands for the checkpoint: the first rank's, never written again; empty if that is lost."""
    names = [name for name in names_in(folder, minutes) if name.startswith("rank-") and name.endswith(".safetensors")]
    return [folder / name for name in names[:1]]


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        # Some network file systems know no locks; there only the newest `keep` checkpoints are safe.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
