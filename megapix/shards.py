"""The on-disk contract between `data_prep`, which writes shards, and `megapix.data`, which reads them.

A shard folder holds

    shard-000000.tar, shard-000001.tar, …   ordinary WebDataset tar files (USTAR)
    samples.bin                             one fixed-size record a sample, in the shards' order
    index.json                              what is in the folder; written last, so its presence means "complete"

and what only `data_prep` reads: plan.json, .receipts/ and rejected.jsonl.

A sample is three tar members, KEY being nine digits (its number in the plan):

    KEY.cls     the class number, ASCII
    KEY.jpg     the image (or KEY.png, KEY.webp: members are sorted by extension)
    KEY.json    {"source": name in the source, "caption": …}

The record of a sample (`RECORD`, little endian, 24 bytes) says where its image lies, so that a reader gets any sample
with one `pread`: place of the shard in the index's list (uint32), image bytes (uint32), offset of the image's data in
the tar file (uint64), class number (int32), CRC-32 of the member's name (uint32). The 512 bytes before that offset are
the member's tar header, whose name the reader checks.

Standard library only: `data_prep` and the trainer share this file, `errors.py` and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megapix.errors import InputError

FORMAT = "megapix-shards"
VERSION = 1
INDEX_NAME = "index.json"
TABLE_NAME = "samples.bin"
IMAGE_EXTENSIONS = ("png", "jpg", "webp")
RECORD = struct.Struct("<IIQiI")
TAR_BLOCK = 512


def shard_name(number: int) -> str:
    """File name of shard `number` (counted from 0)."""
    return f"shard-{number:06d}.tar"


def sample_key(number: int) -> str:
    """WebDataset key of sample `number` (counted from 0): nine ASCII digits, no dots."""
    return f"{number:09d}"


class SampleRecord(NamedTuple):
    """Where one sample's image lies; the fields of `RECORD` in order."""

    shard: int
    size: int
    offset: int
    label: int
    name_crc: int


@dataclass(frozen=True)
class ShardEntry:
    """One tar file of the index."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ClassEntry:
    """One class of the index; its number is its place in the list."""

    name: str
    samples: int


@dataclass(frozen=True)
class Index:
    """What a shard folder holds.

    `image_policy` records how the images were made (size in pixels, crop, output format), `source` where they came
    from (name, licence, attribution). `table_sha256` is the hash of `samples.bin`.
    """

    samples: int
    image_size: int
    image_extension: str
    classes: tuple[ClassEntry, ...]
    shards: tuple[ShardEntry, ...]
    table_sha256: str
    image_policy: dict[str, Any]
    source: dict[str, Any]
    rejected: int
    """Samples of the source that could not be used; `rejected.jsonl` lists them."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number."""
        return tuple(entry.name for entry in self.classes)

    @property
    def digest(self) -> str:
        """SHA-256 of the index's canonical JSON: the identity of a data set, whatever folder it lies in."""
        return hashlib.sha256(_dump(self).encode()).hexdigest()


def _dump(index: Index) -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(index)}, indent=1, sort_keys=True) + "\n"


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json` atomically (temporary file, fsync, rename). Call it last, after every shard and the table."""
    write_atomic(folder / INDEX_NAME, _dump(index).encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file beside `path`, sync it to disk and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_index(folder: str | Path) -> Index:
    """Read and check `index.json` of a shard folder.

    Raises:
        InputError: no such folder, no index in it, not JSON, another format or version, a missing key, no samples.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"shard folder {str(folder)!r} does not exist; make one with 'data_prep write SOURCE OUT'")
    path = folder / INDEX_NAME
    if not path.is_file():
        raise InputError(
            f"shard folder {str(folder)!r} has no {INDEX_NAME}: it is empty or its preparation did not finish; "
            "run the same 'data_prep' command again"
        )
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: format is {found!r}, expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise InputError(f"{path}: version is {data.get('version')!r}, this release reads version {VERSION}")
    try:
        index = Index(
            samples=int(data["samples"]),
            image_size=int(data["image_size"]),
            image_extension=str(data["image_extension"]),
            classes=tuple(ClassEntry(**entry) for entry in data["classes"]),
            shards=tuple(ShardEntry(**entry) for entry in data["shards"]),
            table_sha256=str(data["table_sha256"]),
            image_policy=dict(data["image_policy"]),
            source=dict(data["source"]),
            rejected=int(data["rejected"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a key is missing or of the wrong type: {error}") from error
    if index.samples < 1 or index.samples != sum(shard.samples for shard in index.shards):
        total = sum(shard.samples for shard in index.shards)
        raise InputError(f"{path}: samples is {index.samples}, but its shards hold {total}; expected the same, above 0")
    return index


def check_shards(folder: str | Path, index: Index) -> None:
    """Check that every file the index names is there with its size, and that the sample table has its hash.

    Reads no image data: a stat for each shard and the table (24 bytes a sample).

    Raises:
        InputError: naming the first file that is missing or differs, with both values.
    """
    folder = Path(folder)
    for shard in index.shards:
        path = folder / shard.name
        if not path.is_file():
            raise InputError(f"{path} is missing, but {folder / INDEX_NAME} lists it")
        size = path.stat().st_size
        if size != shard.bytes:
            raise InputError(
                f"{path} has {size} bytes, but {folder / INDEX_NAME} lists {shard.bytes}: "
                "the index does not match its shards; prepare the folder again"
            )
    table = folder / TABLE_NAME
    if not table.is_file():
        raise InputError(f"{table} is missing, but {folder / INDEX_NAME} needs it")
    sha256 = hashlib.sha256(table.read_bytes()).hexdigest()
    if sha256 != index.table_sha256:
        raise InputError(
            f"{table} has sha256 {sha256[:16]}…, but {folder / INDEX_NAME} lists {index.table_sha256[:16]}…: "
            "the index does not match its shards; prepare the folder again"
        )
    expected = index.samples * RECORD.size
    if table.stat().st_size != expected:
        size = table.stat().st_size
        raise InputError(f"{table} has {size} bytes, expected {expected} ({index.samples} samples of {RECORD.size})")
