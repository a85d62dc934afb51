"""Which checkpoints are kept: the newest, one every so many images, the best, and any that is marked or being read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megapix import files
from megapix.checkpoint.find import Saved
from megapix.checkpoint.folder import (
    COMMITTING_NAME,
    HEALTHY_NAME,
    LATEST_NAME,
    OLD,
    checkpoints_of,
    complete,
    point_to,
    protected,
    unread,
)
from megapix.checkpoint.manifest import STATE_NAME, State, read_state
from megapix.config import CheckpointConfig
from megapix.dist import warn
from megapix.errors import InputError, StorageError
from megapix.outage import error_of

GONE, ASIDE = ".gone", ".aside"
"""Suffixes of a checkpoint that is being removed, and of one that was set aside for the user to remove."""


def prune(run: Path, newest: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints before `newest` that no rule keeps. One that cannot be read is left to the user."""
    states = {path: state for path in complete(run) if path <= newest and (state := _state(path))}
    if not config.keep:
        return
    kept = set(sorted(states)[-config.keep :]) | {newest}
    if config.keep_every != "never":
        kept |= {path for path, state in states.items() if _crosses(state, int(config.keep_every))}
    rated = sorted((state.loss, path) for path, state in states.items() if state.loss is not None)
    kept |= {path for _, path in rated[: config.keep_best]}
    for path in sorted(states.keys() - kept):
        if _free(path):
            try:
                erase(_gone(path))
            except OSError as error:
                warn(f"{path} could not be removed: {error.strerror}")


def settle(run: Path, start: Saved | None) -> list[Path]:
    """Make a run folder ready for a run that resumes from `start`; returns the checkpoints that were set aside.

    What a killed process left behind is cleaned up. Checkpoints after `start`, where `latest` was moved back or they
    are damaged, do not belong to what is trained from here on: nothing may resume from them or roll back to them.

    Raises:
        InputError: the file system refuses.
    """
    try:
        _clean(run, start.folder if start else None)
        return leave(run, start.folder, remove=False) if start else []
    except OSError as error:
        raise error_of(error, f"{error.filename or run}: {error.strerror}") from error


def leave(run: Path, last: Path, remove: bool) -> list[Path]:
    """Remove or set aside the checkpoints after `last`, from which the run continues.

    Args:
        remove: remove them, except those that are marked or being read; otherwise set all aside under another name.

    Returns:
        Those that were set aside.

    Raises:
        OSError: one cannot be renamed.
    """
    later = [path for path in complete(run) if path > last]
    gone = [_gone(path) for path in later if remove and _free(path)]
    aside = [set_aside(path) for path in later if path.exists()]
    files.sync_folder(checkpoints_of(run))
    for path in gone:
        erase(path)
    return aside


def set_aside(path: Path) -> Path:
    """Rename a checkpoint, so that no run resumes from it, to a name that none has; returns it. It is the user's now.

    Raises:
        OSError: it cannot be renamed.
    """
    new, number = path.with_name(path.name + ASIDE), 1
    while new.exists():
        number += 1
        new = path.with_name(f"{path.name}{ASIDE}-{number}")
    os.replace(path, new)
    return new


def erase(folder: Path) -> None:
    """Remove a folder that is renamed already; what cannot be removed now is removed at the next start."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        warn(f"{error.filename or folder}: could not be removed: {error.strerror}")


def _clean(run: Path, start: Path | None) -> None:
    """Remove half-written and half-removed checkpoints, restore one that was being replaced, and end a commit."""
    parent = checkpoints_of(run)
    for path in sorted(parent.glob("images-*")):
        final = path.with_suffix("")
        if path.suffix == OLD and not final.exists() and (path / STATE_NAME).is_file():
            os.replace(path, final)
        elif path.suffix in (".tmp", OLD, GONE):
            erase(path)
    for path in complete(run):
        if path == start and (path / COMMITTING_NAME).exists():
            point_to(path)
        (path / COMMITTING_NAME).unlink(missing_ok=True)
    for name in (LATEST_NAME, HEALTHY_NAME, STATE_NAME, "config.json"):
        for folder in (run, parent, *complete(run)):
            for path in folder.glob(f".{name}.*.tmp"):
                path.unlink()


def _free(path: Path) -> bool:
    return not protected(path) and unread(path)


def _gone(path: Path) -> Path:
    """Rename a checkpoint that is to be removed, so that a crash leaves none that looks complete."""
    new = path.with_name(path.name + GONE)
    erase(new)
    os.replace(path, new)
    return new


def _crosses(state: State, every: int) -> bool:
    return state.counters.images_seen // every > state.previous // every


def _state(path: Path) -> State | None:
    try:
        return read_state(path, minutes=0)
    except (InputError, StorageError):
        return None
