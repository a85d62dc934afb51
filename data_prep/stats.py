"""Reference statistics of a shard folder or index: every image once through an extractor, in the table's order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.pool import check_workers, in_processes
from megapix.errors import InputError
from megapix.images import Policy, decode_indexed
from megapix.reference import Reference, Sums, write_reference
from megapix.shards import RECORD, TABLE_NAME, Index, SampleRecord, check_table, read_index
from megapix.storage import Access, Storage, open_storage

Part = tuple[int, int]
"""Half-open range of samples, all of one bucket."""


@dataclass(frozen=True)
class Shards:
    """Where the images of an index lie; each process opens its own storage from it."""

    folder: Path
    index: Index
    access: Access


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

    from megapix.extractors import open_extractor

    check_workers(workers)
    for option, value, least in (("--features", kept, 0), ("--batch", batch, 1)):
        if value < least:
            raise InputError(f"{option} = {value}: expected at least {least}")
    if out.is_dir():
        raise InputError(f"--out {str(out)!r} is a folder; expected a file")
    index = read_index(folder)
    check_table(folder, index)
    if Policy.from_dict(index.image_policy).mode == "untouched":
        raise InputError(
            f"the images in {str(folder)!r} are untouched, of any size; give an index with a policy: "
            f"data_prep index {folder} --out INDEX --size 256"
        )
    if index.samples < 2:
        raise InputError(f"{str(folder)!r} holds one image: expected at least 2")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = open_extractor(extractor, weights, device)
    sums, features = Sums(net.width), []
    chosen = np.arange(min(kept, index.samples)) * index.samples // max(1, min(kept, index.samples))
    with tqdm(total=index.samples, unit="img", disable=not progress, mininterval=0.5) as bar:
        for (start, stop), pixels in _in_order(Shards(folder, index, access), batch, workers):
            found = net(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device))[0].cpu().numpy()
            sums.add(found)
            features.append(found[chosen[(chosen >= start) & (chosen < stop)] - start])
            bar.update(stop - start)
    reference = Reference(sums.moments(), np.concatenate(features), net.name, net.sha256, index.digest)
    write_reference(out, reference)
    return reference


def _in_order(shards: Shards, batch: int, workers: int) -> Iterator[tuple[Part, NDArray[np.uint8]]]:
    """Decoded parts, uint8 [B, H, W, 3], in order: sums of floating-point numbers depend on it."""
    waiting: dict[int, tuple[Part, NDArray[np.uint8]]] = {}
    following = 0
    for part, pixels in in_processes(partial(_decode, shards), _parts(shards.index, batch), workers):
        waiting[part[0]] = (part, pixels)
        while following in waiting:
            yield waiting[following]
            following = waiting.pop(following)[0][1]


def _parts(index: Index, batch: int) -> Iterator[Part]:
    """Ranges of up to `batch` samples; entries of one bucket lie together, and a part never spans two buckets."""
    ends: dict[int, int] = {}
    total = 0
    for entry in index.shards:
        total += entry.samples
        ends[entry.bucket] = total
    start = 0
    for end in ends.values():
        while start < end:
            yield start, min(start + batch, end)
            start = min(start + batch, end)


def _decode(shards: Shards, part: Part) -> NDArray[np.uint8]:
    storage, index = _storage(shards.index.base or str(shards.folder), shards.access), shards.index
    policy = Policy.from_dict(index.image_policy)
    start, stop = part
    with open(shards.folder / TABLE_NAME, "rb") as file:
        file.seek(start * RECORD.size)
        data = file.read((stop - start) * RECORD.size)
    return np.stack([_image(storage, index, policy, SampleRecord(*row)) for row in RECORD.iter_unpack(data)])


_storage = lru_cache(maxsize=1)(open_storage)
"""One for each process, since it keeps its files open."""


def _image(storage: Storage, index: Index, policy: Policy, record: SampleRecord) -> NDArray[np.uint8]:
    entry = index.shards[record.shard]
    try:
        data = storage.read(entry.name, record.offset, record.size)
        return decode_indexed(data, policy, entry.bucket, index.prepared)
    except (OSError, ValueError) as error:
        raise InputError(f"{storage.where(entry.name)}: the image at byte {record.offset}: {error}") from error
