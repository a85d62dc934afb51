"""Shards from a source: plan, then write in worker processes, then table and index.

The plan (which sample goes to which place of which shard) is a function of the source's names, the seed and the shard
size, so any number of workers writes the same bytes. A shard file appears under its name only when it is complete and
on disk; the index is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from data_prep.sources import Item, Source
from megapix import shards
from megapix.errors import InputError
from megapix.shards import ClassEntry, Index, SampleRecord, ShardEntry, write_atomic


@dataclass(frozen=True)
class Options:
    """What the written bytes depend on, beside the source; recorded in the index."""

    size: int
    extension: str
    quality: int
    samples_per_shard: int
    seed: int


class Job(NamedTuple):
    """One shard to write."""

    number: int
    items: tuple[Item, ...]
    first_sample: int


Written: TypeAlias = tuple[ShardEntry, list[SampleRecord]]
Work: TypeAlias = Callable[[Job], Written]


def write(source: Source, out: Path, options: Options, workers: int, progress: bool = True) -> tuple[Index, bool]:
    """Write `source` into the folder `out`; return the index, and whether it was there already.

    Raises:
        InputError: an option out of range, a folder that holds something else, other options than those it was
            written with, or an image that cannot be used.
    """
    _check(options, workers)
    planned = plan(source.items, options)
    recorded = _recorded(source, options)
    existing = _existing(out, recorded)
    if existing:
        return existing, True
    try:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(".*.tmp"):
            leftover.unlink()
        finished = _run(partial(write_shard, source, out, options), planned, workers, len(source.items), progress)
        table = b"".join(shards.RECORD.pack(*record) for _, records in finished for record in records)
        write_atomic(out / shards.TABLE_NAME, table)
        counts = Counter(item.label for item in source.items)
        index = Index(
            samples=len(source.items),
            image_size=options.size,
            image_extension=options.extension,
            classes=tuple(ClassEntry(name, counts[label]) for label, name in enumerate(source.classes)),
            shards=tuple(entry for entry, _ in finished),
            table_sha256=hashlib.sha256(table).hexdigest(),
            image_policy=recorded["image_policy"],
            source=recorded["source"],
        )
        shards.write_index(out, index)
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror}") from error
    return index, False


def plan(items: tuple[Item, ...], options: Options) -> list[Job]:
    """Shuffle by seed (in the order of a hash of seed and name, the same everywhere) and cut into shards."""
    shuffled = sorted(items, key=lambda item: hashlib.sha256(f"{options.seed}/{item.name}".encode()).digest())
    starts = range(0, len(shuffled), options.samples_per_shard)
    return [
        Job(number, tuple(shuffled[start : start + options.samples_per_shard]), start)
        for number, start in enumerate(starts)
    ]


def write_shard(source: Source, out: Path, options: Options, job: Job) -> Written:
    """Write one shard atomically; return its entry and its samples' records. Runs in a worker process.

    Raises:
        InputError: an image that cannot be used; names it and the reason.
    """
    from webdataset import TarWriter

    from data_prep.transform import encode

    path = out / shards.shard_name(job.number)
    temporary = out / f".{path.name}.tmp"
    with open(temporary, "wb") as file:
        with TarWriter(file, user="megapix", group="megapix", mtime=0, encoder=False) as tar:
            for number, item in enumerate(job.items, job.first_sample):
                try:
                    image = encode(source.render(item, options.size), options.extension, options.quality)
                except ValueError as error:
                    raise InputError(f"image {item.name!r} cannot be used: {error}") from error
                about = {"source": item.name, "caption": item.caption}
                tar.write(
                    {
                        "__key__": shards.sample_key(number),
                        options.extension: image,
                        "cls": str(item.label).encode(),
                        "json": json.dumps(about, ensure_ascii=False).encode(),
                    }
                )
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(temporary) as written:
        images = [member for member in written if member.name.endswith(f".{options.extension}")]
    records = [
        SampleRecord(job.number, member.size, member.offset_data, item.label)
        for member, item in zip(images, job.items, strict=True)
    ]
    entry = ShardEntry(path.name, len(job.items), temporary.stat().st_size, _sha256(temporary))
    os.replace(temporary, path)
    return entry, records


def _run(work: Work, jobs: list[Job], workers: int, samples: int, progress: bool) -> list[Written]:
    from tqdm import tqdm

    results: list[Written] = []
    with (
        tqdm(total=samples, unit="img", disable=not progress, mininterval=0.5) as bar,
        ProcessPoolExecutor(min(workers, len(jobs)), get_context("forkserver")) as pool,
    ):
        try:
            for job, result in zip(jobs, pool.map(work, jobs), strict=True):
                results.append(result)
                bar.update(len(job.items))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check(options: Options, workers: int) -> None:
    for name, value in (("size", options.size), ("samples-per-shard", options.samples_per_shard), ("workers", workers)):
        if value < 1:
            raise InputError(f"--{name} = {value}: expected at least 1")
    if not 1 <= options.quality <= 100:
        raise InputError(f"--quality = {options.quality}: expected 1 to 100")


def _recorded(source: Source, options: Options) -> dict[str, dict[str, Any]]:
    """What the index says of images and source; equal records mean equal bytes."""
    names = "\n".join(f"{item.name}\t{item.label}\t{item.caption}" for item in source.items)
    policy: dict[str, Any] = {"policy": source.policy, "size": options.size, "format": options.extension}
    if options.extension != "png":
        policy["quality"] = options.quality
    return {
        "image_policy": policy,
        "source": source.about
        | {
            "seed": options.seed,
            "samples_per_shard": options.samples_per_shard,
            "list_sha256": hashlib.sha256(names.encode()).hexdigest(),
        },
    }


def _existing(out: Path, recorded: dict[str, dict[str, Any]]) -> Index | None:
    """The index of a finished folder with the same options; None if there is nothing, or an unfinished one."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError(f"{str(out)!r} is not a folder")
    if not (out / shards.INDEX_NAME).exists():
        for path in out.iterdir():
            ours = path.name == shards.TABLE_NAME or path.name.lstrip(".").startswith(("shard-", shards.TABLE_NAME))
            if not ours:
                raise InputError(f"{str(out)!r} holds {path.name!r}, which is not ours; give an empty or new folder")
        return None
    index = shards.read_index(out)
    for part, found in (("image_policy", index.image_policy), ("source", index.source)):
        for key in sorted(recorded[part].keys() | found.keys()):
            there, here = found.get(key), recorded[part].get(key)
            if there != here:
                raise InputError(
                    f"{str(out)!r} was written with {key} = {there!r}, this command has {here!r}; "
                    "give another folder, or the old value"
                )
    shards.check_shards(out, index)
    return index
