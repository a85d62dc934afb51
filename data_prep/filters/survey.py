"""A look at all images before the plan: which of them filters take, and which are duplicates of others.

It is needed for duplicates alone, and for a dry run; else sizes are judged when the images are written. What is
seen is kept among the receipts, so an interrupted command looks at no image twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_prep.filters.duplicates import duplicates_of
from data_prep.filters.fingerprints import fingerprint, length_of
from data_prep.filters.rules import Filters
from data_prep.listing.base import Item, Reader, header_of
from data_prep.parts.chunks import Chunk, chunks, seen
from data_prep.parts.part import WHOLE, Part
from data_prep.writing.pool import in_processes
from megapix.shards.image_policy import Policy
from megapix.shards.pixels import decode, size_of

Verdicts: TypeAlias = NDArray[np.uint8]
"""uint8 [N]: 0 where a sample stays, the number of the option in `Filters.options`, from 1, or UNREADABLE."""
UNREADABLE = 255
"""Of an image that cannot be read: writing will reject it."""


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

    found: dict[int, bytes] = {}
    if kept:
        kept.mkdir(exist_ok=True)
    work = partial(_look_at, reader, filters, policy, kept)
    with tqdm(total=len(items), unit="img", desc="filters", disable=not progress, mininterval=0.5) as bar:
        for chunk, records in in_processes(work, chunks(items, part), workers):
            found[chunk.number] = records
            bar.update(len(chunk.items))
    return resolved(b"".join(found[number] for number in sorted(found)), filters)


def _width(filters: Filters) -> int:
    return 1 + (length_of(filters.duplicates) if filters.duplicates else 0)


def _look_at(reader: Reader, filters: Filters, policy: Policy, kept: Path | None, chunk: Chunk) -> bytes:
    records = partial(_records, reader, filters, policy, chunk)
    return seen(kept, "filters", chunk, _width(filters), records) if kept else records()


def _records(reader: Reader, filters: Filters, policy: Policy, chunk: Chunk) -> bytes:
    return b"".join(record_of(*_of_item(reader, filters, policy, item), filters) for item in chunk.items)


def _of_item(reader: Reader, filters: Filters, policy: Policy, item: Item) -> tuple[int, bytes]:
    if item.fault:
        return UNREADABLE, b""
    try:
        data = reader.read(item, policy.size) if filters.duplicates else header_of(reader, item, policy.size)
        return look(data, filters, policy)
    except (OSError, ValueError):
        return UNREADABLE, b""
