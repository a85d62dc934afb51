"""What a run has logged, read from its event files. Imports no torch.

TensorBoard's own reader goes through every byte in Python to check its CRC: minutes for a run's images. Here a record's
checksums are passed over; one that was cut off in the middle of writing, or cannot be parsed, ends its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

NAME = "*tfevents*"
"""What TensorBoard takes for an event file."""
HEAD, FOOT = 12, 4
"""Bytes of a record before and after its event."""
SMALL = 2**16
"""Bytes that no record of scalars has."""


class Record(NamedTuple):
    """A record of an event file."""

    step: int
    event: Any
    """The parsed Event; None for a record that is damaged, or passed over as too large."""
    data: bytes | None
    """Its bytes as they lie in the file; None for one that is damaged."""


class Point(NamedTuple):
    """A value of a scalar."""

    value: float
    when: float
    """Seconds since 1970."""


@dataclass
class Events:
    """What a run has logged: tag -> step -> value. Of several values of a step the last one counts."""

    scalars: dict[str, dict[int, Point]] = field(default_factory=dict)
    images: dict[str, dict[int, bytes]] = field(default_factory=dict)
    """PNG files."""
    texts: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    """All texts of a step."""

    def last(self, tag: str) -> Point | None:
        """The newest value of a scalar."""
        points = self.scalars.get(tag)
        return points[max(points)] if points else None

    @property
    def step(self) -> int:
        """The newest step with a scalar."""
        return max((step for points in self.scalars.values() for step in points), default=0)

    @property
    def when(self) -> float | None:
        """When the newest scalar was logged, in seconds since 1970."""
        return max((point.when for points in self.scalars.values() for point in points.values()), default=None)


def read_events(folder: Path, pictures: bool = True) -> Events:
    """Everything in the event files of `folder`; nothing if there are none.

    Args:
        pictures: read images, and texts that are as long as one.
    """
    found = Events()
    for path in sorted(folder.glob(NAME)):
        for record in records(path, None if pictures else SMALL):
            for value in record.event.summary.value if record.event else ():
                _take(found, value, record)
    return Events(_in_order(found.scalars), _in_order(found.images), _in_order(found.texts))


def scalar_tags(folder: Path) -> set[str]:
    """Tags of all scalars in the event files of `folder`."""
    return {
        value.tag
        for path in folder.glob(NAME)
        for record in records(path, SMALL)
        for value in (record.event.summary.value if record.event else ())
        if value.HasField("simple_value")
    }


def records(path: Path, largest: int | None = None) -> Iterator[Record]:
    """Each record of an event file; the last one, without data, if it is damaged.

    Args:
        largest: records of more bytes are passed over: they come without an event.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    damaged = Record(0, None, None)
    with open(path, "rb") as file:
        while head := file.read(HEAD):
            length = int.from_bytes(head[:8], "little")
            if len(head) < HEAD or length > path.stat().st_size:
                yield damaged
                return
            if largest is not None and length > largest:
                file.seek(length + FOOT, 1)
                yield Record(0, None, b"")
                continue
            body = file.read(length + FOOT)
            try:
                event = Event.FromString(body[:-FOOT])
            except DecodeError:
                body = b""
            if len(body) < length + FOOT:
                yield damaged
                return
            yield Record(event.step, event, head + body)


def _in_order(kind: dict[str, dict[int, Any]]) -> dict[str, dict[int, Any]]:
    return {tag: dict(sorted(of_tag.items())) for tag, of_tag in sorted(kind.items())}


def _take(found: Events, value: Any, record: Record) -> None:
    if value.HasField("simple_value"):
        found.scalars.setdefault(value.tag, {})[record.step] = Point(value.simple_value, record.event.wall_time)
    elif value.HasField("image"):
        found.images.setdefault(value.tag, {})[record.step] = value.image.encoded_image_string
    elif value.metadata.plugin_data.plugin_name == "text":
        texts = [text.decode(errors="replace") for text in value.tensor.string_val]
        tag = value.tag.removesuffix("/text_summary")
        found.texts.setdefault(tag, {}).setdefault(record.step, []).extend(texts)
