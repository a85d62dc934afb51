"""The on-disk contract between `data_prep`, which writes shards, and `megapix.data`, which reads them.

A shard folder holds

    shard-000000.tar, shard-000001.tar, …   ordinary WebDataset tar files (USTAR)
    samples.bin                             one fixed-size record a sample, in the shards' order
    captions.bin                            the captions in the same order, UTF-8, end to end; those of one sample are
                                            one text (`megapix.captions`)
    index.json                              what is in the folder; written last, so its presence means "complete"

and what only `data_prep` reads: plan.json, .receipts/ and rejected.jsonl. In an index over tar files that exist
already (`data_prep index`), the tar files lie elsewhere: `base` names the folder or URL, and they keep their names.
Features of the captions may be stored there, too: text-*.safetensors (`megapix.text_features`).

A sample that `data_prep write` wrote is three tar members, KEY being nine digits (its number in the plan):

    KEY.cls     the class number, ASCII
    KEY.jpg     the image (or KEY.png, KEY.webp: members are sorted by extension)
    KEY.json    {"source": name in the source, "caption": …}, or with several captions
                {"source": …, "captions": [{"text": …, "weight": …}, …]}

The record of a sample (`RECORD`, little endian, 36 bytes) says where its image lies, so that a reader gets any sample
with one read: place of the entry in the index's list (uint32), image bytes (uint32), offset of the image's data in the
tar file (uint64), class number (int32), CRC-32 of the image's bytes (uint32), offset of its captions in captions.bin
(uint64) and their bytes (uint32).

An entry of the index is the samples of one tar file that belong to one bucket; a tar file with several buckets has
several entries. Entries are in the order of their buckets.

Standard library only: `data_prep` and the trainer share this file, `captions`, `errors`, `images` and `storage`,
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megapix.errors import InputError

FORMAT = "megapix-shards"
VERSION = 2
INDEX_NAME = "index.json"
TABLE_NAME = "samples.bin"
CAPTIONS_NAME = "captions.bin"
RECORD = struct.Struct("<IIQiIQI")
TAR_BLOCK = 512


def shard_name(number: int) -> str:
    """File name of shard `number` (counted from 0)."""
    return f"shard-{number:06d}.tar"


def sample_key(number: int) -> str:
    """WebDataset key of sample `number` (counted from 0): nine ASCII digits, no dots."""
    return f"{number:09d}"


class SampleRecord(NamedTuple):
    """Where one sample's image and caption lie; the fields of `RECORD` in order."""

    shard: int
    size: int
    offset: int
    label: int
    crc: int
    caption_offset: int
    caption_size: int


@dataclass(frozen=True)
class ShardEntry:
    """The samples of one tar file that belong to one bucket."""

    name: str
    """File name, relative to the folder or URL where the shards lie."""
    samples: int
    bytes: int
    """Size of the tar file."""
    sha256: str
    """Hash of the tar file."""
    bucket: int = 0
    """Place in the list of sizes of the image policy."""


@dataclass(frozen=True)
class ClassEntry:
    """One class of the index; its number is its place in the list."""

    name: str
    samples: int


@dataclass(frozen=True)
class Index:
    """What a shard folder holds."""

    samples: int
    base: str
    """Folder or URL of the tar files; empty if they lie beside the index."""
    classes: tuple[ClassEntry, ...]
    shards: tuple[ShardEntry, ...]
    table_sha256: str
    """Hash of `samples.bin`."""
    captions_sha256: str
    """Hash of `captions.bin`."""
    image_policy: dict[str, Any]
    """How images are made (`megapix.images.Policy`), and "applied": at "preparation" or on "loading"."""
    source: dict[str, Any]
    """Where the images came from: kind, licence, attribution, options of the preparation."""
    rejected: int
    """Samples of the source that could not be used; `rejected.jsonl` lists them."""
    text: dict[str, Any] | None = None
    """Features of the captions that are stored beside the index (`megapix.text_features`); None, and no key, if none
    are."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number."""
        return tuple(entry.name for entry in self.classes)

    @property
    def prepared(self) -> bool:
        """Whether the images were made by the policy when they were written, and not when they are read."""
        return bool(self.image_policy["applied"] == "preparation")

    @property
    def files(self) -> tuple[ShardEntry, ...]:
        """One entry for each tar file."""
        return tuple({entry.name: entry for entry in self.shards}.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the index's canonical JSON without `base` and `text`: the identity of a data set, wherever it lies
        and whatever was computed from it."""
        return hashlib.sha256(_dump(self, without=("base", "text")).encode()).hexdigest()


def _dump(index: Index, without: tuple[str, ...] = ()) -> str:
    data = {"format": FORMAT, "version": VERSION, **asdict(index)}
    if index.text is None:
        without = (*without, "text")
    return json.dumps({k: v for k, v in data.items() if k not in without}, indent=1, sort_keys=True) + "\n"


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json` atomically (temporary file, fsync, rename). Call it last, after every shard and the table."""
    write_atomic(folder / INDEX_NAME, _dump(index).encode())


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file beside `path`, sync it to disk and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(option: str, path: Path) -> None:
    """Find out before the work whether a file can be written at `path`; its folder is made.

    Raises:
        InputError: it cannot; names `option`.
    """
    if path.is_dir():
        raise InputError(f"{option} {str(path)!r} is a folder; expected a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {str(path)!r}: nothing can be written there: {error.strerror}") from error


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
            samples=_count(data["samples"]),
            base=_text(data["base"]),
            classes=tuple(ClassEntry(_text(entry["name"]), _count(entry["samples"])) for entry in data["classes"]),
            shards=tuple(_shard_entry(entry) for entry in data["shards"]),
            table_sha256=_sha256(data["table_sha256"]),
            captions_sha256=_sha256(data["captions_sha256"]),
            image_policy=dict(data["image_policy"]),
            source=dict(data["source"]),
            rejected=_count(data["rejected"]),
            text=dict(data["text"]) if "text" in data else None,
        )
        if index.image_policy["applied"] not in ("preparation", "loading"):
            raise ValueError(f"image_policy.applied is {index.image_policy['applied']!r}")
        if not isinstance(index.image_policy["buckets"], list):
            raise ValueError(f"image_policy.buckets is {index.image_policy['buckets']!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a key is missing or of the wrong type: {error}") from error
    if not index.classes:
        raise InputError(f"{path}: there are no classes")
    if index.samples < 1 or index.samples != sum(shard.samples for shard in index.shards):
        total = sum(shard.samples for shard in index.shards)
        raise InputError(f"{path}: samples is {index.samples}, but its shards hold {total}; expected the same, above 0")
    sizes_made = max(1, len(index.image_policy["buckets"]))
    if (worst := max(shard.bucket for shard in index.shards)) >= sizes_made:
        raise InputError(f"{path}: a shard has bucket {worst}, but the image policy has {sizes_made}")
    buckets = [shard.bucket for shard in index.shards]
    if buckets != sorted(buckets):
        raise InputError(f"{path}: the shards are not in the order of their buckets")
    return index


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def _sha256(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", _text(value)):
        raise ValueError(f"{value!r} is not a SHA-256 hash")
    return str(value)


def _shard_entry(data: dict[str, Any]) -> ShardEntry:
    name = _text(data["name"])
    # An index may come from a stranger: its shards lie below its base, and nowhere else.
    if not name or name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise ValueError(f"shard name {name!r} leads out of the folder")
    samples, size, bucket = (_count(data[key]) for key in ("samples", "bytes", "bucket"))
    return ShardEntry(name, samples, size, _sha256(data["sha256"]), bucket)


def check_table(folder: str | Path, index: Index) -> None:
    """Check that `samples.bin` and `captions.bin` have the size and hash that the index lists.

    Raises:
        InputError: naming the file, with both values.
    """
    for name, sha256 in ((TABLE_NAME, index.table_sha256), (CAPTIONS_NAME, index.captions_sha256)):
        path = Path(folder) / name
        if not path.is_file():
            raise InputError(f"{path} is missing, but {Path(folder) / INDEX_NAME} needs it")
        if (found := sha256_of(path)) != sha256:
            raise InputError(
                f"{path} has sha256 {found[:16]}…, but {Path(folder) / INDEX_NAME} lists {sha256[:16]}…: "
                "the index does not match its shards; prepare the folder again"
            )
    table, expected = Path(folder) / TABLE_NAME, index.samples * RECORD.size
    if (size := table.stat().st_size) != expected:
        raise InputError(f"{table} has {size} bytes, expected {expected} ({index.samples} samples of {RECORD.size})")


def missing_shards(base: Path, index: Index) -> list[str]:
    """What is wrong with each local tar file that is not there with the size that the index lists; reads no data."""
    faults = []
    for shard in index.files:
        path = base / shard.name
        if not path.is_file():
            faults.append(f"{path} is missing, but {INDEX_NAME} lists it")
        elif (size := path.stat().st_size) != shard.bytes:
            faults.append(
                f"{path} has {size} bytes, but {INDEX_NAME} lists {shard.bytes}: "
                "the index does not match its shards; prepare the folder again"
            )
    return faults


def features_fault(path: Path, header: bytes, size: int, listed_in: str) -> str:
    """What is wrong with a file of features, by its size and its first bytes; empty if nothing is.

    Args:
        header: what it begins with.
        size: bytes that it has.
        listed_in: name of the file that says so.
    """
    try:
        there = path.stat().st_size
        with open(path, "rb") as opened:
            found = opened.read(len(header))
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    if there != size:
        return f"{path} has {there} bytes, expected {size}"
    return "" if found == header else f"{path} holds other features than {listed_in} says"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
