"""One run per folder: rank 0 holds a lock on RUN/lock while a run works in it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megapix.dist import World, on_all_ranks, warn
from megapix.errors import InputError

LOCK_NAME = "lock"
PATIENCE = 120.0
"""Seconds that a start waits for the lock: the run before it may still be ending, and NFS drops a lost host's locks
after 90 s."""


@contextmanager
def run_lock(run: Path, world: World, patience: float = PATIENCE) -> Iterator[None]:
    """Lock a run folder, so that a second run in it is refused; every rank enters it. The lock ends with its process.
    A folder in which nothing has been written is left as it was found.

    Raises:
        CollectiveInputError: another run holds it, or it cannot be written.
    """
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    file = on_all_ranks(world, lambda: _lock(run, patience) if world.main else None)
    try:
        yield
    finally:
        if file:
            _leave_no_trace(run, missing)
            file.close()


def _leave_no_trace(run: Path, made: list[Path]) -> None:
    """Remove the lock and the folders that were made for it, if there is nothing else in them."""
    with suppress(OSError):
        if [path.name for path in run.iterdir()] == [LOCK_NAME]:
            (run / LOCK_NAME).unlink()
            for folder in made:
                folder.rmdir()


def _lock(run: Path, patience: float) -> IO[str]:
    path = run / LOCK_NAME
    while True:
        file = _locked(run, path, patience)
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()  # whoever held it has removed it: a lock on it keeps nobody out
    try:
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        file.close()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return file


def _locked(run: Path, path: Path, patience: float) -> IO[str]:
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - it stays open, and so locked, while the run lasts
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    file.seek(0)
    holder, end = file.read().strip(), time.monotonic() + patience
    waiting = False
    while not _try(file):
        if time.monotonic() >= end:
            file.close()
            raise InputError(
                f"out = {str(run)!r}: another run works there ({holder}); expected one run per folder. "
                f"If that process is gone for certain, remove {path}"
            )
        if not waiting:
            waiting = True
            warn(f"{path} is held by {holder}: waiting up to {patience:.0f} s for its end")
        time.sleep(0.2)
    return file


def _try(file: IO[str]) -> bool:
    """Lock it if nobody has; where the file system knows no locks, continue without one."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warn(f"{file.name}: cannot be locked ({error.strerror}): nothing keeps a second run out of this folder")
    return True
