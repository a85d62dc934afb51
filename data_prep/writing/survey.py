"""The bucket of every sample, from the headers of the images: part of the plan, so it is made first and kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.listing.base import Item, Reader, header_of
from data_prep.parts.chunks import Chunk, chunks, seen
from data_prep.parts.part import WHOLE, Part
from data_prep.writing.pool import in_processes
from data_prep.writing.receipt import RECEIPTS
from megapix.files import write_atomic
from megapix.shards.image_policy import Policy

SURVEY_NAME = "buckets.bin"
CODE = "H"
"""A bucket in that file, as `array` calls its type."""


def buckets_of(
    reader: Reader,
    items: Sequence[Item],
    out: Path,
    policy: Policy,
    workers: int,
    progress: bool,
    part: Part = WHOLE,
) -> Sequence[int]:
    """The bucket of each item. A sample that cannot be read is given the first; writing will reject it.

    Args:
        part: the share that this process looks at first; it takes the rest from the others as far as they have got.
    """
    from tqdm import tqdm

    path = out / SURVEY_NAME
    buckets = array(CODE, bytes(2 * len(items)))
    if path.is_file() and path.stat().st_size == len(buckets) * buckets.itemsize:
        return array(CODE, path.read_bytes())
    with tqdm(total=len(buckets), unit="img", desc="sizes", disable=not progress, mininterval=0.5) as bar:
        work = partial(_kept, reader, policy, out / RECEIPTS)
        for chunk, found in in_processes(work, chunks(items, part), workers):
            buckets[chunk.first : chunk.first + len(chunk.items)] = array(CODE, found)
            bar.update(len(chunk.items))
    write_atomic(path, buckets.tobytes())
    return buckets


@dataclass(frozen=True)
class Rare:
    """Buckets that have too few samples for a batch of their own, and the buckets that take these."""

    least: int = 0
    into: dict[int, int] = field(default_factory=dict)
    """Bucket -> the one that takes its samples."""
    counts: dict[int, int] = field(default_factory=dict)
    """Bucket -> its samples."""

    @staticmethod
    def below(least: int, counts: Counter[int], policy: Policy) -> Rare:
        """Those of fewer than `least` samples: each goes to the nearest in aspect ratio that has as many, or where none
        has, to the one that has most."""
        enough = [bucket for bucket, count in counts.items() if count >= least] or [
            min(counts, key=lambda bucket: (-counts[bucket], bucket))
        ]
        rare = sorted(set(counts) - set(enough))
        into = {bucket: min(sorted(enough), key=partial(policy.apart, bucket)) for bucket in rare}
        return Rare(least, into, {bucket: counts[bucket] for bucket in rare})

    def recorded(self) -> dict[str, Any]:
        """What the index's image policy says of them; nothing without the option."""
        if not self.least:
            return {}
        moved = [[bucket, into, self.counts[bucket]] for bucket, into in self.into.items()]
        return {"bucket_min": self.least, "merged": moved}


def _kept(reader: Reader, policy: Policy, kept: Path, chunk: Chunk) -> bytes:
    """The buckets of a chunk as they lie in `buckets.bin`."""
    return seen(kept, "buckets", chunk, array(CODE).itemsize, partial(_buckets, reader, policy, chunk))


def _buckets(reader: Reader, policy: Policy, chunk: Chunk) -> bytes:
    found = array(CODE)
    for item in chunk.items:
        try:
            found.append(policy.bucket_of(*policy.size_of(header_of(reader, item, policy.size))))
        except (OSError, ValueError):
            found.append(0)
    return found.tobytes()
