"""TensorBoard's event files of a run that goes back to a checkpoint: what came after it is taken out of them.

A process that dies leaves rows of steps that its successor takes again. TensorBoard's own mark for that, which
`SummaryWriter(purge_step=…)` writes, is ignored by its default reader, and then a row stays that no later row of the
same step replaces. Without those rows, every reader shows one line.
"""

from __future__ import annotations

import os
from pathlib import Path

NAME = "*tfevents*"
"""What TensorBoard takes for an event file."""


def purge(folder: Path, after: int) -> None:
    """Drop all events of steps above `after` from the files of `folder`; a file that has none stays untouched.

    A file is replaced at once, so that a reader or a crash meets the old one or the new one. A record that was cut off
    in the middle of writing is dropped too.
    """
    for path in sorted(folder.glob(NAME)):
        _purge_file(path, after)


def _purge_file(path: Path, after: int) -> None:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    shorter = path.with_name("purging.tmp")  # no name of an event file
    dropped = False
    with open(shorter, "wb") as file:
        records = RecordWriter(file)
        for record in RawEventFileLoader(str(path)).Load():
            if Event.FromString(record).step > after:
                dropped = True
            else:
                records.write(record)
        file.flush()
        os.fsync(file.fileno())
    if dropped:
        os.replace(shorter, path)
    else:
        shorter.unlink()
