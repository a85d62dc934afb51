"""The folder of a run's checkpoints: names, `latest`, and the marks and read locks that keep one from removal."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megapix.checkpoint.manifest import STATE_NAME, Counters
from megapix.errors import InputError
from megapix.files import write_atomic

LATEST_NAME = "latest"
OLD = ".old"
"""Suffix of a checkpoint while another of the same name replaces it."""
KEEP_NAME, HEALTHY_NAME = "KEEP", "HEALTHY"
"""Files that keep the checkpoint they lie in from removal: KEEP is a person's, HEALTHY the spike sentinel's."""


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def name_of(counters: Counters) -> str:
    """Name of the checkpoint at these counters."""
    return f"images-{counters.images_seen:012d}"


def complete(run: Path) -> list[Path]:
    """The checkpoints that were committed, oldest first. A name with a suffix is none, but for NAME.old without a NAME:
    a process was killed while it replaced it."""
    folders = {p for p in checkpoints_of(run).glob("images-*") if (p / STATE_NAME).is_file()}
    return sorted(p for p in folders if not p.suffix or (p.suffix == OLD and p.with_suffix("") not in folders))


def point_to(folder: Path) -> None:
    """Make `latest` name a checkpoint."""
    write_atomic(folder.parent / LATEST_NAME, f"{folder.name}\n".encode())


def latest(run: Path) -> Path | None:
    """The checkpoint that `latest` names, be it there or not (or its NAME.old, as in `complete`); None without one."""
    pointer = checkpoints_of(run) / LATEST_NAME
    try:
        name = pointer.read_text(errors="replace").strip()
    except OSError:
        return None
    named = pointer.parent / (Path(name).name or "(nothing)")
    left = named.with_name(named.name + OLD)
    return left if left.is_dir() and not named.exists() else named


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
    return any((folder / name).exists() for name in (KEEP_NAME, HEALTHY_NAME))


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Hold a read lock on a checkpoint: a run's retention leaves it alone (`unread`).

    Raises:
        InputError: it is not there any more, or cannot be read.
    """
    with ExitStack() as stack:
        for path in _locked_file(folder):
            try:
                file = stack.enter_context(open(path, "rb"))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from error
            _lock(file.fileno(), fcntl.LOCK_SH)
        yield


def unread(folder: Path) -> bool:
    """Whether nobody holds a read lock on this checkpoint (`reading`); false too if that cannot be checked."""
    for path in _locked_file(folder):
        try:
            with open(path, "r+b") as file:  # over NFS only a file that is open for writing can be locked exclusively
                return _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _locked_file(folder: Path) -> list[Path]:
    """The file whose lock stands for the checkpoint: the first rank's, never written again; empty if that is lost."""
    return sorted(folder.glob("rank-*.safetensors"))[:1]


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        # Some network file systems know no locks; there only the newest `keep` checkpoints are safe.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
