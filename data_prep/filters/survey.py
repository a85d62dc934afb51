"""A look at all images before the plan: which of them filters take, and which are duplicates of others.

It is needed for duplicates alone, and for a dry run; else sizes are judged when the images are written. What is
seen is kept among the receipts, so an interrupted command looks at no image twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_prep.filters.duplicates import duplicates_of
from data_prep.filters.fingerprints import fingerprint, length_of
from data_prep.filters.rules import Filters
from data_prep.listing.base import Item, Reader
from data_prep.parts.part import WHOLE, Part
from data_prep.writing.pool import in_processes
from megapix.files import write_atomic
from megapix.shards.image_policy import Policy
from megapix.shards.pixels import decode, size_of

Verdicts: TypeAlias = NDArray[np.uint8]
"""uint8 [N]: 0 where a sample stays, the number of the option in `Filters.options`, from 1, or UNREADABLE."""
UNREADABLE = 255
"""Of an image that cannot be read: writing will reject it."""
PART = 1000
"""Samples that a process looks at in one go."""


class _Some(NamedTuple):
    number: int
    items: tuple[Item, ...]


def look(data: bytes, filters: Filters, policy: Policy) -> tuple[int, bytes]:
    """The verdict on one encoded image, and its fingerprint where duplicates are asked for and no filter takes it.

    Without duplicates its header alone is read.
    """
    try:
        if option := filters.of_size(*size_of(data)):
            return 1 + filters.options.index(option), b""
        if filters.duplicates:
            return 0, fingerprint(decode(data, policy.background), filters.duplicates)
        return 0, b""
    except ValueError:
        return UNREADABLE, b""


def record_of(verdict: int, print_: bytes, filters: Filters) -> bytes:
    """As parts are kept: a byte, and the fingerprint or zeros."""
    return bytes([verdict]) + print_.ljust(_width(filters) - 1, b"\0")


def resolved(records: bytes, filters: Filters) -> Verdicts:
    """The verdicts on all samples in their order, from their records: with duplicates among those that stay."""
    table = np.frombuffer(records, np.uint8).reshape(-1, _width(filters))
    verdicts = table[:, 0].copy()
    if filters.duplicates:
        left = np.flatnonzero(verdicts == 0)
        taken = left[duplicates_of(table[left, 1:], filters.duplicates)]
        verdicts[taken] = len(filters.options)
    return verdicts


def survey(
    reader: Reader,
    items: Sequence[Item],
    filters: Filters,
    policy: Policy,
    workers: int,
    kept: Path | None = None,
    progress: bool = True,
    part: Part = WHOLE,
) -> Verdicts:
    """The verdict on each item.

    Args:
        kept: folder that keeps what was seen, and is made; None keeps nothing.
        part: the share that this process looks at first; it takes the rest from the others as far as they have got.
    """
    from tqdm import tqdm

    seen: dict[int, bytes] = {}
    if kept:
        kept.mkdir(exist_ok=True)
    work = partial(_look_at, reader, filters, policy, kept)
    with tqdm(total=len(items), unit="img", desc="filters", disable=not progress, mininterval=0.5) as bar:
        for some, records in in_processes(work, _parts(items, part), workers):
            seen[some.number] = records
            bar.update(len(some.items))
    return resolved(b"".join(seen[number] for number in sorted(seen)), filters)


def _width(filters: Filters) -> int:
    return 1 + (length_of(filters.duplicates) if filters.duplicates else 0)


def _parts(items: Sequence[Item], part: Part) -> Iterator[_Some]:
    for number in part.mine_first(-(-len(items) // PART)):
        yield _Some(number, tuple(items[number * PART : (number + 1) * PART]))


def _look_at(reader: Reader, filters: Filters, policy: Policy, kept: Path | None, some: _Some) -> bytes:
    path = kept / f"filters-{some.number:06d}.bin" if kept else None
    if path and path.is_file() and path.stat().st_size == len(some.items) * _width(filters):
        return path.read_bytes()
    records = b"".join(record_of(*_of_item(reader, filters, policy, item), filters) for item in some.items)
    if path:
        write_atomic(path, records)
    return records


def _of_item(reader: Reader, filters: Filters, policy: Policy, item: Item) -> tuple[int, bytes]:
    if item.fault:
        return UNREADABLE, b""
    try:
        return look(reader.read(item, policy.size), filters, policy)
    except (OSError, ValueError):
        return UNREADABLE, b""
