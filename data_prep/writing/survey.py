"""The bucket of every sample, from the headers of the images: part of the plan, so it is made first and kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.listing.base import Item, Reader
from data_prep.parts.part import WHOLE, Part
from data_prep.writing.pool import in_processes
from data_prep.writing.receipt import RECEIPTS
from megapix.files import write_atomic
from megapix.shards.image_policy import Policy

SURVEY_NAME = "buckets.bin"
PART = 1000
"""Samples that a process looks at in one go."""


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
    buckets = array("H", bytes(2 * len(items)))
    if path.is_file() and path.stat().st_size == len(buckets) * buckets.itemsize:
        return array("H", path.read_bytes())
    with tqdm(total=len(buckets), unit="img", desc="sizes", disable=not progress, mininterval=0.5) as bar:
        work = partial(_buckets, reader, policy, out)
        for (first, some), found in in_processes(work, _parts(items, part), workers):
            buckets[first : first + len(some)] = array("H", found)
            bar.update(len(some))
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


def _parts(items: Sequence[Item], part: Part) -> Iterator[tuple[int, tuple[Item, ...]]]:
    for number in part.mine_first(-(-len(items) // PART)):
        yield number * PART, tuple(items[number * PART : (number + 1) * PART])


def _buckets(reader: Reader, policy: Policy, out: Path, some: tuple[int, tuple[Item, ...]]) -> bytes:
    """As they lie in `buckets.bin`; kept among the receipts, so that nobody looks at an image twice."""
    first, items = some
    path, found = out / RECEIPTS / f"buckets-{first // PART:06d}.bin", array("H")
    if path.is_file() and path.stat().st_size == len(items) * found.itemsize:
        return path.read_bytes()
    for item in items:
        try:
            found.append(policy.bucket_of(*policy.size_of(reader.read(item, policy.size))))
        except (OSError, ValueError):
            found.append(0)
    write_atomic(path, found.tobytes())
    return found.tobytes()
