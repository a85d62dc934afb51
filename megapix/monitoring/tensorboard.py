"""TensorBoard: rows, images and texts on one global step, and event files without the steps that a resume takes again.

A process that dies leaves rows of steps after its last checkpoint, which its successor takes again. TensorBoard's own
mark for that, which `SummaryWriter(purge_step=…)` writes, is ignored by its default reader, and then a row stays that
no later row of the same step replaces. So `purge` takes those rows out of the files, and every reader shows one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megapix.dist import warn
from megapix.monitoring import charts, events

PREFIX = "events.out.tfevents."
STAMP = re.compile(rf"{re.escape(PREFIX)}(\d+)")


class Writer:
    """TensorBoard events of one run, written by one rank; on the others `enabled` is false and nothing happens.

    The global step counts steps taken, applied or not, so it survives a resume.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool) -> None:
        """Open `folder`; events that an earlier process has logged after `first_step` are dropped."""
        self._folder, self._first_step, self._enabled = folder, first_step, enabled
        self._board: Any = None
        self._purged = False
        self._tags: set[str] = set()
        self._layout: dict[str, dict[str, list[object]]] = {}

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Write one row of scalars; NaN stands for a missing value and is left out."""
        known = {name: value for name, value in row.items() if not math.isnan(value)}

        def add(board: Any) -> None:
            for name, value in known.items():
                board.add_scalar(name, value, step)
            self._tags |= known.keys()
            if (layout := charts.layout(self._tags)) != self._layout:  # of several layouts TensorBoard takes the last
                board.add_custom_scalars(layout)
                self._layout = layout

        self._write(add)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image [H, W, 3]."""
        self._write(lambda board: board.add_image(name, image, step, dataformats="HWC"))

    def event(self, step: int, text: str) -> None:
        """Write an event, under the text tag `events`."""
        self.text(step, "events", text)

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text, in Markdown."""
        self._write(lambda board: board.add_text(name, text, step))

    def configuration(self, step: int, config: dict[str, Any]) -> None:
        """Write the resolved configuration as text."""
        text = "\n".join("    " + line for line in json.dumps(config, indent=2).splitlines())
        self._write(lambda board: board.add_text("config", text, step))

    def close(self) -> None:
        """Flush and close."""
        if self._board:
            self._write(lambda board: board.flush())
        if self._board:
            self._board.close()

    def _write(self, add: Callable[[Any], None]) -> None:
        """Add something and flush. A run does not end because of its log: what cannot be written is warned about."""
        if not self._enabled:
            return
        try:
            self._board = self._board or self._open()
            add(self._board)
            self._board.flush()
        except OSError as error:
            self._board = None  # its thread is dead; the next row opens another file
            where = error.filename or self._folder
            warn(f"{where}: TensorBoard's rows are lost, they cannot be written: {error.strerror or error}")

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if self._purged:
            return SummaryWriter(str(self._folder))
        put_before(self._folder, int(time.time()))
        purge(self._folder, self._first_step)
        self._tags |= events.scalar_tags(self._folder)
        self._purged = True
        # For a TensorBoard that has read those files already: its own mark.
        return SummaryWriter(str(self._folder), purge_step=self._first_step + 1)


def put_before(folder: Path, now: int) -> None:
    """Rename the event files that would come after one of the time `now`: a host's clock was ahead, or this one's is
    behind. Readers take files in the order of their names, and drop what has the step of an earlier row.

    Args:
        now: seconds since 1970, which a new file has in its name.
    """
    files = sorted(folder.glob(events.NAME))
    later = [path for path in files if (found := STAMP.match(path.name)) and int(found[1]) >= now]
    before = [path for path in files if path not in later]
    last = before[-1].name if before else f"{PREFIX}{now - 1:010d}" if later else ""
    for number, path in enumerate(later):
        os.replace(path, path.with_name(f"{last}.{number:06d}"))


def purge(folder: Path, after: int) -> None:
    """Drop all events of steps above `after` from the files of `folder`; a file that has none stays untouched.

    A file is replaced at once, so that a reader or a crash meets the old one or the new one. A record that was cut off
    in the middle of writing, or cannot be read, is dropped too, with what follows it.
    """
    for path in sorted(folder.glob(events.NAME)):
        if any(record.data is None or record.step > after for record in events.records(path)):
            _purge_file(path, after)


def _purge_file(path: Path, after: int) -> None:
    shorter = path.with_name("purging.tmp")  # no name of an event file
    with open(shorter, "wb") as file:
        for record in events.records(path):
            if record.data is not None and record.step <= after:
                file.write(record.data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(shorter, path)
