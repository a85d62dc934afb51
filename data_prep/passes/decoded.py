"""The images of a shard folder or index as the trainer's loader decodes them, in processes and in order."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import tee
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.writing.pool import in_processes
from megapix.errors import InputError
from megapix.shards.image_policy import Policy, decode_indexed
from megapix.shards.index import Index, read_index
from megapix.shards.storage import Access, Storage, open_storage
from megapix.shards.table import SampleRecord, Table, check_table

Part = tuple[int, int]
"""Half-open range of samples, all of one bucket."""


@dataclass(frozen=True)
class Shards:
    """Where the images of an index lie; each process opens its own storage from it."""

    folder: Path
    index: Index
    access: Access


def open_sized(folder: Path, access: Access) -> Shards:
    """The shards in a folder, whose images have sizes that the index knows.

    Raises:
        InputError: no such index, or untouched images.
    """
    index = read_index(folder)
    check_table(folder, index)
    if Policy.from_dict(index.image_policy).mode == "untouched":
        raise InputError(
            f"the images in {str(folder)!r} are untouched, of any size; give an index with a policy: "
            f"data_prep index {folder} --out INDEX --size 256"
        )
    return Shards(folder, index, access)


def in_order(shards: Shards, parts: Iterable[Part], workers: int) -> Iterator[tuple[Part, NDArray[np.uint8]]]:
    """Each part with its images, uint8 [B, H, W, 3], in the order given.

    Raises:
        InputError: an image that cannot be read or decoded, or is not the indexed one.
    """
    ahead, parts = tee(parts)
    arriving = in_processes(partial(_decode, shards), ahead, workers)
    waiting: dict[Part, NDArray[np.uint8]] = {}
    for part in parts:
        while part not in waiting:
            done, pixels = next(arriving)
            waiting[done] = pixels
        yield part, waiting.pop(part)


def _decode(shards: Shards, part: Part) -> NDArray[np.uint8]:
    storage, index = _storage(shards.index.tars_at(shards.folder), shards.access), shards.index
    policy = Policy.from_dict(index.image_policy)
    records = Table(shards.folder, index).rows(*part)
    return np.stack([_image(storage, index, policy, record) for record in records])


_storage = lru_cache(maxsize=1)(open_storage)
"""One for each process, since it keeps its files open."""


def _image(storage: Storage, index: Index, policy: Policy, record: SampleRecord) -> NDArray[np.uint8]:
    entry = index.shards[record.shard]
    try:
        data = storage.read(entry.name, record.offset, record.size)
        if zlib.crc32(data) != record.crc:
            raise ValueError("its bytes are not those that were indexed")
        return decode_indexed(data, policy, entry.bucket, index.prepared)
    except (OSError, ValueError) as error:
        raise InputError(f"{storage.where(entry.name)}: the image at byte {record.offset}: {error}") from error
