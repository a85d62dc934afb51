"""Memory of preparation's main process at ImageNet's size: 1.3 million synthetic entries of synset tars.

    python -m benchmarks.plan_memory

Listed, planned, and put together again from the receipts of 1,300 shards: everything but the workers' images.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from data_prep.listing.base import Item
from data_prep.listing.classes import Classes
from data_prep.sources.imagenet import SynsetTars
from data_prep.writing.finish import finish
from data_prep.writing.plan import Options, describe, jobs
from data_prep.writing.receipt import RECEIPTS, Receipt, Sample
from megapix.shards.image_policy import Policy
from megapix.shards.index import ShardEntry, shard_name

SYNSETS, IMAGES = 1000, 1300


def peak() -> str:
    """Time and peak memory so far."""
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def main() -> None:
    """Print peak memory and time."""
    start = time.perf_counter()
    names = [f"n{number:08d}" for number in range(SYNSETS)]
    items = [
        Item(f"{synset}/{synset}_{image}.JPEG", label, synset, (f"/data/{synset}.tar", image * 110_000, 109_000, ""))
        for label, synset in enumerate(names)
        for image in range(IMAGES)
    ]
    source, options = SynsetTars(tuple(names), items), Options(Policy.make("crop", 256))
    describe(source, options)
    count = 0
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / RECEIPTS).mkdir()
        for job in jobs(items, options):
            samples = tuple(
                Sample(0, 109_000, n * 110_000, item.label, n, item.caption) for n, item in enumerate(job.items)
            )
            entry = ShardEntry(shard_name(job.number), len(samples), 110_000_000, "0" * 64)
            Receipt((entry,), samples, ()).save(Path(root), job.number)
            count += 1
        print(f"{len(items):,} samples planned in {count:,} shards: {peak()}, {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        classes = Classes(source.classes)
        index = finish(Path(root), range(count), lambda _: classes, "", options.policy.to_dict(), source.about)
        assert index.samples == len(items)
        print(f"put together from {count:,} receipts: {peak()}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
