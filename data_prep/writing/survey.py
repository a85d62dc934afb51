"""The bucket of every sample, from the headers of the images: part of the plan, so it is made first and kept."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from data_prep.sources.base import Item, Reader, Source
from data_prep.writing.pool import in_processes
from megapix.files import write_atomic
from megapix.shards.image_policy import Policy
from megapix.shards.pixels import size_of

SURVEY_NAME = "buckets.bin"
PART = 1000
"""Samples that a process looks at in one go."""


def buckets_of(source: Source, out: Path, policy: Policy, workers: int, progress: bool) -> Sequence[int]:
    """The bucket of each item. A sample that cannot be read is given the first; writing will reject it."""
    from tqdm import tqdm

    path = out / SURVEY_NAME
    buckets = array("H", bytes(2 * len(source.items)))
    if path.is_file() and path.stat().st_size == len(buckets) * buckets.itemsize:
        return array("H", path.read_bytes())
    with tqdm(total=len(buckets), unit="img", desc="sizes", disable=not progress, mininterval=0.5) as bar:
        work = partial(_buckets, source.reader, policy)
        for (first, items), found in in_processes(work, _parts(source.items), workers):
            buckets[first : first + len(items)] = array("H", found)
            bar.update(len(items))
    write_atomic(path, buckets.tobytes())
    return buckets


def _parts(items: Sequence[Item]) -> Iterator[tuple[int, tuple[Item, ...]]]:
    for first in range(0, len(items), PART):
        yield first, tuple(items[first : first + PART])


def _buckets(reader: Reader, policy: Policy, part: tuple[int, tuple[Item, ...]]) -> list[int]:
    found = []
    for item in part[1]:
        try:
            found.append(policy.bucket_of(*size_of(reader.read(item, policy.size))))
        except (OSError, ValueError):
            found.append(0)
    return found
