"""What a run folder says of its run, read while the run is at work or long after; nothing in it is changed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megapix import config as configuration
from megapix.checkpoint.folder import checkpoints_of, complete, latest
from megapix.checkpoint.manifest import State, read_state
from megapix.config import Config
from megapix.errors import InputError, StorageError
from megapix.monitoring.events import Events, Point, read_events
from megapix.monitoring.processes import Process, processes
from megapix.resilience.run_lock import LOCK_NAME
from megapix.text import text_of

CONFIG_NAME, EVENTS_NAME = "config.json", "tensorboard"
DEPTH = 4
"""Levels of folders below the one that runs are looked for in."""

Standing = Literal["running", "finished", "stopped", "interrupted", "not begun"]
"""'stopped' is saved where it stands; 'interrupted' has logged steps that its last checkpoint does not have."""


@dataclass(frozen=True)
class RunFacts:
    """What a run folder says."""

    folder: Path
    config: Config
    """Resolved, of its newest process."""
    saved: State | None
    """The newest checkpoint's, without its files."""
    checkpoint: str
    """Name of that checkpoint; empty without one."""
    events: Events
    processes: list[Process]
    running: bool

    @property
    def step(self) -> int:
        """The newest step that is known."""
        return max(self.events.step, self._saved_step)

    @property
    def images_seen(self) -> int:
        """At that step, as far as it was logged or saved."""
        logged = self.events.last("schedule/images_seen")
        return max(int(logged.value) if logged else 0, self.saved.counters.images_seen if self.saved else 0)

    @property
    def end(self) -> int:
        """Images seen at the end of the run."""
        return int(self.config.optim.end_at)

    @property
    def standing(self) -> Standing:
        """What the run does now."""
        if self.running:
            return "running"
        if self.saved and self.saved.counters.images_seen >= self.end:
            return "finished"
        if not self.step:
            return "not begun"
        return "interrupted" if self.events.step > self._saved_step else "stopped"

    @property
    def score(self) -> tuple[str, Point] | None:
        """The last Fréchet distance of the small evaluation, and its name."""
        tags = [tag for tag in self.events.scalars if tag == "evaluation/fid" or tag.startswith("evaluation/fd_")]
        last = self.events.last(tags[0]) if tags else None
        return (tags[0].partition("/")[2], last) if last else None

    def images_at(self, step: int) -> int:
        """Images seen at a step: those of the last row up to it, and the steps since then."""
        rows = self.events.scalars.get("schedule/images_seen", {})
        last = max((logged for logged in rows if logged <= step), default=None)
        before = 0 if last is None else int(rows[last].value)
        return before + (step - (last or 0)) * self.config.optim.global_batch

    @property
    def _saved_step(self) -> int:
        return self.saved.counters.drawn // self.saved.config.optim.global_batch if self.saved else 0


def read_run(folder: Path, pictures: bool = False) -> RunFacts:
    """Read a run folder.

    Args:
        pictures: read sample grids, too.

    Raises:
        InputError: no run is there, or what is there cannot be read.
    """
    if not is_run(folder):
        raise InputError(
            f"{str(folder)!r} is no run folder: expected one with {CONFIG_NAME}, as `megapix train` makes it"
        )
    try:
        events = read_events(folder / EVENTS_NAME, pictures)
    except FileNotFoundError:  # a process that starts is shortening a file
        events = read_events(folder / EVENTS_NAME, pictures)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    newest = latest(folder, minutes=0)
    saved = _state(newest) if newest else None
    running = _is_locked(folder / LOCK_NAME)
    name = newest.name if newest and saved else ""
    return RunFacts(folder, _config(folder), saved, name, events, processes(folder), running)


def is_run(folder: Path) -> bool:
    """Whether a run has begun to write there."""
    return (folder / CONFIG_NAME).is_file() and any(
        path.exists() for path in (folder / EVENTS_NAME, folder / LOCK_NAME, checkpoints_of(folder))
    )


def runs_in(folder: Path) -> Iterator[Path]:
    """Run folders at or below `folder`, in the order of their names; nothing is looked for inside of a run."""
    for at, names, _ in os.walk(folder):
        here = Path(at)
        if is_run(here):
            yield here
            names.clear()
        elif len(here.relative_to(folder).parts) >= DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))


def checkpoints(run: RunFacts) -> list[tuple[Path, State]]:
    """Its checkpoints, oldest first, but for those that cannot be read."""
    return [(path, state) for path in complete(run.folder) if (state := _state(path))]


def _config(folder: Path) -> Config:
    import json

    path = folder / CONFIG_NAME
    try:
        data = json.loads(text_of(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a table of options, found {type(data).__name__}")
    return configuration.from_dict(Config, data, str(path))


def _state(checkpoint: Path) -> State | None:
    """A checkpoint's state; None where there is none that can be read, as while the run replaces it."""
    try:
        return read_state(checkpoint, minutes=0)
    except (InputError, StorageError):
        return None


def _is_locked(path: Path) -> bool:
    """Whether a process holds the run's lock; a file system without locks says no."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
