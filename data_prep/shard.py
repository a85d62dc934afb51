"""One shard, written in a worker process: rendered samples, a tar file, and a receipt that says it is finished.

The receipt (`.receipts/shard-000000.tar.json`) holds the shard's size, hash, records and rejected samples. It is
written before the tar file gets its name, so a shard under its name always has one, and a receipt without its shard
means that the shard must be written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.plan import Job, Options
from data_prep.source import Item, Reader
from megapix import shards
from megapix.errors import InputError
from megapix.shards import SampleRecord, ShardEntry, write_atomic

RECEIPTS = ".receipts"


@dataclass(frozen=True)
class Rejected:
    """A sample that could not be used."""

    source: str
    reason: str
    exception: str


@dataclass(frozen=True)
class Receipt:
    """What is known of a finished shard; `entry` is None where every sample was rejected."""

    entry: ShardEntry | None
    records: tuple[SampleRecord, ...]
    rejected: tuple[Rejected, ...]


def finished(out: Path, number: int) -> Receipt | None:
    """The receipt of a shard that is there with its size and hash; None if it must be (re)written.

    Raises:
        InputError: the shard is there, but differs from its receipt.
    """
    path = _receipt_path(out, number)
    if not path.is_file():
        return None
    data = json.loads(path.read_text())
    receipt = Receipt(
        ShardEntry(**data["entry"]) if data["entry"] else None,
        tuple(SampleRecord(*record) for record in data["records"]),
        tuple(Rejected(**rejected) for rejected in data["rejected"]),
    )
    if receipt.entry is None:
        return receipt
    shard = out / receipt.entry.name
    if not shard.is_file():
        return None
    if shard.stat().st_size != receipt.entry.bytes or sha256_of(shard) != receipt.entry.sha256:
        raise InputError(f"{shard} differs from what was written; delete it to have it written again")
    return receipt


def write_shard(reader: Reader, out: Path, options: Options, job: Job) -> Receipt:
    """Write one shard; a sample that cannot be used is left out and listed. The bytes depend on the arguments alone."""
    from webdataset import TarWriter

    name = shards.shard_name(job.number)
    temporary = out / f".{name}.tmp"
    kept: list[Item] = []
    rejected: list[Rejected] = []
    with open(temporary, "wb") as file:
        with TarWriter(file, user="megapix", group="megapix", mtime=0, encoder=False) as tar:
            for number, item in enumerate(job.items, job.first):
                try:
                    image = _render(reader, item, options)
                except ValueError as error:
                    cause = error.__cause__ or error
                    rejected.append(Rejected(item.name, str(error), type(cause).__name__))
                    continue
                kept.append(item)
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
    # A shard that is written again goes first, so that its old bytes never stand beside the new receipt.
    (out / name).unlink(missing_ok=True)
    receipt = _receipt(temporary, name, job.number, kept, rejected, options)
    write_atomic(_receipt_path(out, job.number), (json.dumps(asdict(receipt)) + "\n").encode())
    if kept:
        os.replace(temporary, out / name)
    else:
        temporary.unlink()
    return receipt


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _render(reader: Reader, item: Item, options: Options) -> bytes:
    from data_prep.transform import centre_crop, decode, encode

    try:
        data = reader.read(item, options.size)
    except OSError as error:  # the file went away, or cannot be read
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    image = decode(data)
    if min(image.size) < options.min_side:
        raise ValueError(f"{image.width}x{image.height} pixels, --min-side is {options.min_side}")
    return encode(centre_crop(image, options.size), options.extension, options.quality)


def _receipt(
    path: Path, name: str, number: int, kept: list[Item], rejected: list[Rejected], options: Options
) -> Receipt:
    if not kept:
        return Receipt(None, (), tuple(rejected))
    with tarfile.open(path) as written:
        images = [member for member in written if member.name.endswith(f".{options.extension}")]
    records = tuple(
        SampleRecord(number, member.size, member.offset_data, item.label, zlib.crc32(member.name.encode()))
        for member, item in zip(images, kept, strict=True)
    )
    entry = ShardEntry(name, len(kept), path.stat().st_size, sha256_of(path))
    return Receipt(entry, records, tuple(rejected))


def _receipt_path(out: Path, number: int) -> Path:
    return out / RECEIPTS / f"{shards.shard_name(number)}.json"
