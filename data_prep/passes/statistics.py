"""Reference statistics of a shard folder or index: every image once through an extractor, in the table's order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.passes.decoded import Part, in_order, open_sized
from data_prep.writing.pool import check_workers
from megapix.errors import InputError
from megapix.files import check_writable
from megapix.shards.index import Index
from megapix.shards.statistics import Reference, Sums, write_reference
from megapix.shards.storage import Access


def stats(
    folder: Path,
    out: Path,
    extractor: str,
    weights: Path | None,
    kept: int,
    batch: int,
    workers: int,
    access: Access,
    progress: bool = True,
) -> Reference:
    """Compute the statistics and write them to `out`.

    Args:
        extractor: its name.
        weights: its file, where the user brings it.
        kept: features to keep for KID, precision and recall, evenly spread over the samples.
        batch: images that go through the extractor together.

    Raises:
        InputError: bad options, no such index, an image that cannot be read or decoded, or `out` cannot be written.
    """
    import torch
    from tqdm import tqdm

    from megapix.encoders.scoring import open_extractor

    check_workers(workers)
    for option, value, least in (("--features", kept, 0), ("--batch", batch, 1)):
        if value < least:
            raise InputError(f"{option} = {value}: expected at least {least}")
    check_writable("--out", out)
    shards = open_sized(folder, access)
    index = shards.index
    if index.samples < 2:
        raise InputError(f"{str(folder)!r} holds one image: expected at least 2")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = open_extractor(extractor, weights)
    net.to(device)
    sums, features = Sums(net.width), []
    chosen = np.arange(min(kept, index.samples)) * index.samples // max(1, min(kept, index.samples))
    with tqdm(total=index.samples, unit="img", disable=not progress, mininterval=0.5) as bar:
        for (start, stop), pixels in in_order(shards, list(_parts(index, batch)), workers):
            found = net(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device))[0].cpu().numpy()
            sums.add(found)
            features.append(found[chosen[(chosen >= start) & (chosen < stop)] - start])
            bar.update(stop - start)
    reference = Reference(sums.moments(), np.concatenate(features), net.name, net.sha256, index.digest)
    write_reference(out, reference)
    return reference


def _parts(index: Index, batch: int) -> Iterator[Part]:
    """Ranges of up to `batch` samples; entries of one bucket lie together, and a part never spans two buckets."""
    ends: dict[int, int] = {}
    total = 0
    for bucket, samples in index.bucket_samples.items():
        total += samples
        ends[bucket] = total
    start = 0
    for end in ends.values():
        while start < end:
            yield start, min(start + batch, end)
            start = min(start + batch, end)
