"""Is a shard folder what its index says? Reads everything; changes nothing."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from data_prep.shard import sha256_of
from megapix.errors import InputError
from megapix.shards import RECORD, TABLE_NAME, Index, SampleRecord, ShardEntry, check_shards, read_index


def verify(folder: Path, workers: int, progress: bool = True) -> Iterator[str]:
    """Yield every fault found: sizes and hashes of shards and table, order of members, records, classes, decoding.

    Raises:
        InputError: the index itself cannot be read.
    """
    from tqdm import tqdm

    index = read_index(folder)
    try:
        check_shards(folder, index)
    except InputError as error:
        yield str(error)
    table = (folder / TABLE_NAME).read_bytes() if (folder / TABLE_NAME).is_file() else b""
    jobs, first = [], 0
    for place, entry in enumerate(index.shards):
        size = RECORD.size
        records = [
            SampleRecord(*RECORD.unpack_from(table, n * size))
            for n in range(first, min(first + entry.samples, len(table) // size))
        ]
        jobs.append((place, entry, records))
        first += entry.samples
    with (
        tqdm(total=index.samples, unit="img", disable=not progress, mininterval=0.5) as bar,
        ProcessPoolExecutor(min(workers, len(jobs)), get_context("forkserver")) as pool,
    ):
        for (_, entry, _), faults in zip(jobs, pool.map(partial(_verify_shard, folder, index), jobs), strict=True):
            bar.update(entry.samples)
            yield from faults


def _verify_shard(folder: Path, index: Index, job: tuple[int, ShardEntry, list[SampleRecord]]) -> list[str]:
    from data_prep.transform import decode

    place, entry, records = job
    path = folder / entry.name
    if not path.is_file():
        return []  # said by check_shards
    if sha256_of(path) != entry.sha256:
        return [f"{path}: sha256 differs from the index: the file was changed or damaged"]
    faults: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            keys = list(dict.fromkeys(member.name.partition(".")[0] for member in members))
            expected = [f"{key}.{e}" for key in keys for e in sorted(("cls", "json", index.image_extension))]
            if [member.name for member in members] != expected:
                return [f"{path}: the members are not KEY.cls, KEY.json and KEY.{index.image_extension} in order"]
            if len(keys) != entry.samples or len(records) != entry.samples:
                return [f"{path}: holds {len(keys)} samples, the index lists {entry.samples}"]
            for key, record in zip(keys, records, strict=True):
                image = tar.getmember(f"{key}.{index.image_extension}")
                if (record.shard, record.offset, record.size) != (place, image.offset_data, image.size):
                    faults.append(f"{path}: sample {key}: {TABLE_NAME} does not point at its image")
                label = tar.extractfile(f"{key}.cls")
                if label is None or label.read() != str(record.label).encode():
                    faults.append(f"{path}: sample {key}: the class differs from {TABLE_NAME}")
                data = tar.extractfile(image)
                try:
                    size = decode(data.read() if data else b"").size
                except ValueError as error:
                    faults.append(f"{path}: sample {key}: cannot be decoded: {error}")
                    continue
                if size != (index.image_size, index.image_size):
                    faults.append(f"{path}: sample {key}: {size[0]}x{size[1]} pixels, expected {index.image_size}")
    except tarfile.TarError as error:
        faults.append(f"{path}: cannot be read as a tar file: {error}")
    return faults
