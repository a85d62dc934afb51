"""Which checkpoints stay: the newest, one every so many images, the best, and any that is marked or being read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megapix import checkpoint
from megapix.checkpoint import STATE_NAME, State
from megapix.config import CheckpointConfig
from megapix.errors import InputError


def prune(run: Path, newest: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints before `newest` that no rule keeps. One that cannot be read is left for its owner.

    Raises:
        OSError: the file system refuses.
    """
    states = {path: state for path in checkpoint.complete(run) if path <= newest and (state := _state(path))}
    if not config.keep:
        return
    kept = set(sorted(states)[-config.keep :]) | {newest}
    if config.keep_every != "never":
        kept |= {path for path, state in states.items() if _crosses(state, int(config.keep_every))}
    rated = sorted((state.loss, path) for path, state in states.items() if state.loss is not None)
    kept |= {path for _, path in rated[: config.keep_best]}
    for path in states.keys() - kept:
        if not checkpoint.protected(path) and checkpoint.unread(path):
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint; a crash on the way leaves none that looks complete."""
    gone = path.with_name(f"{path.name}.gone")
    os.replace(path, gone)
    shutil.rmtree(gone)


def clean(run: Path) -> None:
    """Put right what a killed process left: half-written and half-removed checkpoints, one that was being replaced.

    Raises:
        OSError: the file system refuses.
    """
    for path in checkpoint.checkpoints_of(run).glob("images-*.*"):
        final = path.with_suffix("")
        if path.suffix == ".old" and not final.exists() and (path / STATE_NAME).is_file():
            os.replace(path, final)
        else:
            shutil.rmtree(path)


def _crosses(state: State, every: int) -> bool:
    return state.counters.images_seen // every > state.previous // every


def _state(path: Path) -> State | None:
    try:
        return checkpoint.read_state(path)
    except InputError:
        return None
