"""One shard, written in a worker process: rendered samples, a tar file, and a receipt that says it is finished.

The receipt is written before the tar file gets its name, so a shard under its name always has one, and a receipt
without its shard means that the shard must be written again.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.listing.base import Filtered, Item, Reader
from data_prep.writing import receipt
from data_prep.writing.plan import Job, Options
from data_prep.writing.pool import Outcome
from data_prep.writing.receipt import Receipt, Rejected, Sample
from megapix.errors import InputError
from megapix.files import sha256_of, temporary_of
from megapix.shards.captions import unpack
from megapix.shards.index import ShardEntry, sample_key, shard_name

TRANSCODED = "transcoded to PNG"
"""Counted where --format original cannot keep the bytes."""


def write_shard(reader: Reader, out: Path, options: Options, retry_rejected: bool, rehash: bool, job: Job) -> Outcome:
    """Write one shard, or find it finished. A sample that cannot be used is left out and listed.

    The bytes depend on reader, options and job alone.

    Args:
        rehash: compare the hash of a shard that is there, whatever its size and time of modification say.

    Raises:
        InputError: the shard is there, but differs from its receipt.
    """
    made = _finished(out, job, rehash)
    if made is None or (retry_rejected and made.rejected):
        made = _write(reader, out, options, job)
    return Outcome(len(job.items), made.rejected)


def _finished(out: Path, job: Job, rehash: bool) -> Receipt | None:
    """Its receipt, if the shard is there. One that has its size, and has not changed since, is not hashed."""
    there = receipt.load(out, job.number)
    for entry in there.entries if there else ():
        shard = out / entry.name
        if not shard.is_file():
            return None
        found = shard.stat()
        newer = found.st_mtime_ns > receipt.written_at(out, job.number)
        if found.st_size != entry.bytes or ((newer or rehash) and sha256_of(shard) != entry.sha256):
            raise InputError(f"{shard} differs from what was written; delete it to have it written again")
        if newer and there:
            there.save(out, job.number)  # which is newer then
    return there


def _write(reader: Reader, out: Path, options: Options, job: Job) -> Receipt:
    from webdataset import TarWriter

    name = shard_name(job.number)
    temporary = temporary_of(out / name)
    kept: list[tuple[Item, int]] = []
    rejected: list[Rejected] = []
    filtered: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    try:
        with open(temporary, "wb") as file:
            with TarWriter(file, user="megapix", group="megapix", mtime=0, encoder=False) as tar:
                for number, item in enumerate(job.items, job.first):
                    try:
                        image, extension, noted = _render(reader, item, options, job.bucket)
                    except Filtered as taken:
                        filtered[taken.option] += 1
                        continue
                    except ValueError as error:
                        rejected.append(Rejected.because(item.name, error))
                        continue
                    kept.append((item, zlib.crc32(image)))
                    notes.update(noted)
                    about = json.dumps(_about(item, options.keep), ensure_ascii=False).encode()
                    members = {extension: image, "cls": str(item.label).encode(), "json": about}
                    tar.write({"__key__": sample_key(number), **members})
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk is not made fuller
        raise
    # A shard that is written again goes first, so that its old bytes never stand beside the new receipt.
    (out / name).unlink(missing_ok=True)
    made = replace(_receipt(temporary, name, job.bucket, kept, rejected), filtered=dict(filtered), notes=dict(notes))
    made.save(out, job.number)
    if kept:
        os.replace(temporary, out / name)
    else:
        temporary.unlink()
    return made


def _about(item: Item, keep: tuple[str, ...]) -> dict[str, Any]:
    """The sample's JSON member, with the columns to keep that it has; `data_prep.listing.captions.captions_of` reads it
    back to the same captions."""
    captions = unpack(item.caption)
    metadata = json.loads(item.about) if keep and item.about else {}
    kept = {column: metadata[column] for column in keep if column in metadata}
    if len(captions) == 1:
        return {"source": item.name, "caption": captions[0].text, **kept}
    return {"source": item.name, "captions": [caption._asdict() for caption in captions], **kept}


def _render(reader: Reader, item: Item, options: Options, bucket: int) -> tuple[bytes, str, tuple[str, ...]]:
    """The image as it is written, its ending, and what is to be counted of it."""
    from data_prep.writing.encode import encode, keeps

    if item.fault:
        raise ValueError(item.fault)
    policy = options.policy
    try:
        data = reader.read(item, policy.size)
    except OSError as error:  # the file went away, or cannot be read
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    if options.filters.sizes and (option := options.filters.of_size(*policy.size_of(data))):
        raise Filtered(option)
    pixels, _, notes = policy.render(data, bucket)
    if options.format != "original":
        return encode(pixels, options.format, options.quality), options.format, notes
    if kind := keeps(data):
        return data, kind, notes
    return encode(pixels, "png", options.quality), "png", (*notes, TRANSCODED)


def _receipt(path: Path, name: str, bucket: int, kept: list[tuple[Item, int]], rejected: list[Rejected]) -> Receipt:
    if not kept:
        return Receipt((), (), tuple(rejected))
    with tarfile.open(path) as written:
        images = [member for member in written if not member.name.endswith((".cls", ".json"))]
    samples = tuple(
        Sample(0, member.size, member.offset_data, item.label, crc, item.caption)
        for member, (item, crc) in zip(images, kept, strict=True)
    )
    entry = ShardEntry(name, len(kept), path.stat().st_size, sha256_of(path), bucket)
    return Receipt((entry,), samples, tuple(rejected))
