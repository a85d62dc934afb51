"""TensorBoard's event files of a run that goes back to a checkpoint: what came after it is taken out of them.

A process that dies leaves rows of steps that its successor takes again. TensorBoard's own mark for that, which
`SummaryWriter(purge_step=…)` writes, is ignored by its default reader, and then a row stays that no later row of the
same step replaces. Without those rows, every reader shows one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

NAME = "*tfevents*"
"""What TensorBoard takes for an event file."""
HEAD, FOOT = 12, 4
"""Bytes of a record before and after its event."""


def purge(folder: Path, after: int) -> None:
    """Drop all events of steps above `after` from the files of `folder`; a file that has none stays untouched.

    A file is replaced at once, so that a reader or a crash meets the old one or the new one. A record that was cut off
    in the middle of writing, or cannot be read, is dropped too, with what follows it.
    """
    for path in sorted(folder.glob(NAME)):
        if any(record is None or step > after for step, record in _records(path)):
            _purge_file(path, after)


def _purge_file(path: Path, after: int) -> None:
    shorter = path.with_name("purging.tmp")  # no name of an event file
    with open(shorter, "wb") as file:
        for step, record in _records(path):
            if record is not None and step <= after:
                file.write(record)
        file.flush()
        os.fsync(file.fileno())
    os.replace(shorter, path)


def _records(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each record's step and its bytes as they lie in the file; None, and no more, for one that is damaged.

    TensorBoard's own reader and writer go through every byte in Python to check its CRC: minutes for a run's images.
    A record is its length (uint64), a CRC of that, the event, and a CRC of it.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    with open(path, "rb") as file:
        while head := file.read(HEAD):
            length = int.from_bytes(head[:8], "little")
            if len(head) < HEAD or length > path.stat().st_size:
                yield 0, None
                return
            body = file.read(length + FOOT)
            try:
                step = Event.FromString(body[:-FOOT]).step
            except DecodeError:
                step, body = 0, b""
            if len(body) < length + FOOT:
                yield 0, None
                return
            yield step, head + body
