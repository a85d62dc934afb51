"""A look at every sample of a list, shared by processes and by parts: in chunks, of which each is looked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.listing.base import Item
from data_prep.parts.part import Part
from megapix.files import write_atomic

SIZE = 1000
"""Samples that a process looks at in one go."""


class Chunk(NamedTuple):
    """Some of the samples."""

    number: int
    items: tuple[Item, ...]

    @property
    def first(self) -> int:
        """The place of its first sample in the list."""
        return self.number * SIZE


def chunks(items: Sequence[Item], part: Part) -> Iterator[Chunk]:
    """All chunks, the part's own first."""
    for number in part.mine_first(-(-len(items) // SIZE)):
        yield Chunk(number, tuple(items[number * SIZE : (number + 1) * SIZE]))


def seen(folder: Path, kind: str, chunk: Chunk, width: int, look: Callable[[], bytes]) -> bytes:
    """What `look` says of a chunk, kept in a file of `folder` for whoever asks next.

    Args:
        kind: of look; the file's name begins with it.
        width: bytes that are said of a sample.
    """
    path = folder / f"{kind}-{chunk.number:06d}.bin"
    if path.is_file() and path.stat().st_size == len(chunk.items) * width:
        return path.read_bytes()
    said = look()
    write_atomic(path, said)
    return said
