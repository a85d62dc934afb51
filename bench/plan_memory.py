"""Memory of preparation's plan at ImageNet's size: 1.3 million synthetic entries of synset tars.

python -m bench.plan_memory
"""

from __future__ import annotations

import resource
import time

from data_prep.plan import Options, describe, jobs
from data_prep.source import Item
from data_prep.sources.imagenet import SynsetTars
from megapix.images import Policy

SYNSETS, IMAGES = 1000, 1300


def main() -> None:
    """Print peak memory and time."""
    start = time.perf_counter()
    names = [f"n{number:08d}" for number in range(SYNSETS)]
    items = [
        Item(f"{synset}/{synset}_{image}.JPEG", label, synset, (f"/data/{synset}.tar", image * 110_000, 109_000))
        for label, synset in enumerate(names)
        for image in range(IMAGES)
    ]
    source = SynsetTars(tuple(names), items)
    options = Options(Policy.make("crop", 256))
    describe(source, options)
    planned = list(jobs(items, options))
    assert sum(len(job.items) for job in planned) == len(items)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(items):,} samples, {len(planned):,} shards: peak {peak:.2f} GiB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
