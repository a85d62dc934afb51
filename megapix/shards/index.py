"""`index.json`, and what lies beside it: the contract between `data_prep`, which writes shards, and `megapix.data`.

A shard folder holds

    shard-000000.tar, shard-000001.tar, …   ordinary WebDataset tar files (USTAR)
    shards.bin                              the tar files and the entries of the index (`tables/entries.py`)
    samples.bin                             one fixed-size record per sample, in the shards' order (`table.py`)
    captions.bin                            the captions of the samples in the same order (`table.py`)
    index.json                              what is in the folder; written last, so its presence means "complete"

and what only `data_prep` reads: plan.json, .receipts/, rejected.jsonl and entries.json (what became of every entry of
the source). In an index over tar files that exist already (`data_prep index`), the tar files lie elsewhere: `base`
names the folder or URL, and they keep their names.
Features of the captions may be stored there, too: text-*.safetensors (`text_features.py`). Where the set of tar files
has grown, versions/DIGEST holds the index of before, each a folder like this one.

A sample that `data_prep write` wrote is three tar members, KEY being nine digits (its number in the plan):

    KEY.cls     the class number, ASCII
    KEY.jpg     the image (or KEY.png, KEY.webp: members are sorted by extension)
    KEY.json    {"source": name in the source, "caption": …}, or with several captions
                {"source": …, "captions": [{"text": …, "weight": …}, …]}

An entry of the index is the samples of one tar file that belong to one bucket; a tar file with several buckets has
several entries. Entries are in the order of their buckets. Version 2 has them in index.json itself, and is read, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megapix.errors import InputError
from megapix.files import read_bytes, sha256_of, size_of, whole_file, write_atomic
from megapix.shards.mix.file import is_mix
from megapix.shards.storage import tars_of
from megapix.shards.tables.entries import LARGEST_COUNT as LARGEST_COUNT
from megapix.shards.tables.entries import SHARDS_NAME, Shards, TarFile, check_name
from megapix.shards.tables.entries import ShardEntry as ShardEntry

FORMAT = "megapix-shards"
VERSION, LISTED_VERSION = 3, 2
"""The second has its entries in index.json. What `Index.digest` hashes is in its form."""
INDEX_NAME = "index.json"
IMAGE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".jp2", ".j2k", ".heic", ".heif", ".jxl"),
)
"""Endings of images. What an image is, and whether it can be read, is decided by its first bytes."""
TAR_FILES = "tar files"
PREPARED = {
    "ImageNet's synset tars": r"(^|/)n\d{8}\.tar$",
    TAR_FILES: r"\.tar$",
    "parquet files": r"\.parquet$",
    "images": rf"(?i)({'|'.join(map(re.escape, IMAGE_ENDINGS))})$",
    "a zip file": r"\.zip$",
}
"""What people give in place of an index -> how the names of its files end."""
LOOKED_AT = 10_000
"""Files of a folder without an index that are looked at, to say what it holds."""
TABLE_NAME = "samples.bin"
CAPTIONS_NAME = "captions.bin"
VERSIONS_NAME = "versions"
"""Folder of the older versions of an index whose set has grown."""
TAR_BLOCK = 512


def shard_name(number: int) -> str:
    """File name of shard `number` (counted from 0)."""
    return f"shard-{number:06d}.tar"


def sample_key(number: int) -> str:
    """WebDataset key of sample `number` (counted from 0): nine ASCII digits, no dots."""
    return f"{number:09d}"


def version_name(digest: str) -> str:
    """Where the version of an index with that digest lies, below the index that has taken its place."""
    return f"{VERSIONS_NAME}/{digest[:16]}"


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
    """Folder or URL of the tar files, absolute or relative to the index's own (`tars_at`); empty if they lie
    beside the index."""
    classes: tuple[ClassEntry, ...]
    shards: Sequence[ShardEntry]
    """Its entries; a table (`Shards`), whatever they were given as."""
    table_sha256: str
    """Hash of `samples.bin`."""
    captions_sha256: str
    """Hash of `captions.bin`."""
    image_policy: dict[str, Any]
    """How images are made (`megapix.shards.image_policy.Policy`), and "applied": at "preparation" or on "loading"."""
    source: dict[str, Any]
    """Where the images came from: kind, licence, attribution, options of the preparation."""
    rejected: int
    """Samples of the source that could not be used; `rejected.jsonl` lists them."""
    text: dict[str, Any] | None = None
    """Features of the captions that are stored beside the index (`text_features.py`); None, and no key, if none are."""

    known: tuple[str, str] = field(default=("", ""), compare=False)
    """`identity` and `digest` as they were when the digest was computed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", Shards.of(self.shards))

    @property
    def table(self) -> Shards:
        """The entries as a table, with their columns."""
        assert isinstance(self.shards, Shards)
        return self.shards

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number."""
        return tuple(entry.name for entry in self.classes)

    @property
    def prepared(self) -> bool:
        """Whether the images were made by the policy when they were written, and not when they are read."""
        return bool(self.image_policy["applied"] == "preparation")

    @property
    def files(self) -> Sequence[TarFile]:
        """The tar files."""
        return self.table.files

    @cached_property
    def bucket_samples(self) -> dict[int, int]:
        """Bucket -> its samples, of those that have any, in order."""
        return self.table.bucket_samples()

    def tars_at(self, place: str | Path) -> str:
        """Folder or URL of the tar files, of an index that lies in that folder or below that URL."""
        return tars_of(self.base, str(place), self.table.file(0).name)

    @cached_property
    def digest(self) -> str:
        """The identity of a data set, wherever it lies and whatever was computed from it: SHA-256 of the index's
        canonical JSON with its entries as a list, without `base` and `text`. It is computed when the index is written,
        and taken from there as long as `identity` is that of then."""
        identity, digest = self.known
        return digest if identity == self.identity else self.computed_digest()

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all that the digest is of, quickly: entries count by the hash of their table."""
        about = self._about() | {"shards": self.table.sha256}
        return hashlib.sha256(_json(about).encode()).hexdigest()

    def computed_digest(self) -> str:
        """The digest, from all entries."""
        digest = hashlib.sha256()
        before, after = _json(self._about() | {"version": LISTED_VERSION, "shards": []}).split(EMPTY_LIST)
        for text in chain([before], _listed(self.shards), [after]):
            digest.update(text.encode())
        return digest.hexdigest()

    def _about(self) -> dict[str, Any]:
        """All but the entries, where the set lies and what was computed from it."""
        kept = {one.name for one in fields(self)} - {"base", "text", "shards", "known", "classes"}
        classes = [asdict(entry) for entry in self.classes]
        return {"format": FORMAT, "classes": classes, **{name: getattr(self, name) for name in kept}}


EMPTY_LIST = '\n "shards": []'
"""No text of JSON has a line's end in it, so there is one such place."""


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def _listed(entries: Iterable[ShardEntry]) -> Iterator[str]:
    """The entries as `_json` writes a list of them."""
    yield '\n "shards": ['
    between = "\n"
    for e in entries:
        yield (
            f'{between}  {{\n   "bucket": {e.bucket},\n   "bytes": {e.bytes},\n   "name": {json.dumps(e.name)},\n'
            f'   "samples": {e.samples},\n   "sha256": "{e.sha256}"\n  }}'
        )
        between = ",\n"
    yield "\n ]"


def write_index(folder: Path, index: Index) -> None:
    """Write `shards.bin`, where it is not there yet, and `index.json`, atomically (temporary file, fsync, rename). Call
    it last, after every shard and the tables."""
    table, path = index.table, folder / SHARDS_NAME
    if size_of(path) != table.size or sha256_of(path) != table.sha256:
        with whole_file(path) as file:
            file.writelines(table.blocks())
    entries = {"files": len(index.files), "entries": len(index.shards), "sha256": table.sha256}
    data = index._about() | {"version": VERSION, "base": index.base, "shards": entries}
    data["digest"] = {"of": index.identity, "sha256": index.digest}
    if index.text is not None:
        data["text"] = index.text
    write_atomic(folder / INDEX_NAME, _json(data).encode())


def read_index(folder: str | Path, image_size: int = 0) -> Index:
    """Read and check `index.json` of a shard folder.

    Args:
        image_size: pixels on a side that are wanted, for the command that is proposed where there is no index.

    Raises:
        InputError: no such folder, no index in it (with the command that makes one), not JSON, another format or
            version, a missing key, no samples.
        StorageError: it cannot be read now.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    if size_of(path) is None:
        raise InputError(_no_index(folder, f"--size {image_size or 'N'}"))
    try:
        data = json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path}: format is {found!r}, expected {FORMAT!r}")
    if data.get("version") not in (LISTED_VERSION, VERSION):
        raise InputError(
            f"{path}: version is {data.get('version')!r}, this release reads versions {LISTED_VERSION} and {VERSION}"
        )
    listed = data["version"] == LISTED_VERSION
    try:
        index = Index(
            samples=as_count(data["samples"]),
            base=as_text(data["base"]),
            classes=tuple(ClassEntry(as_text(entry["name"]), as_count(entry["samples"])) for entry in data["classes"]),
            shards=_listed_entries(data["shards"]) if listed else _table(folder, data["shards"]),
            table_sha256=as_sha256(data["table_sha256"]),
            captions_sha256=as_sha256(data["captions_sha256"]),
            image_policy=dict(data["image_policy"]),
            source=dict(data["source"]),
            rejected=as_count(data["rejected"]),
            text=dict(data["text"]) if "text" in data else None,
            known=("", "") if listed else (as_sha256(data["digest"]["of"]), as_sha256(data["digest"]["sha256"])),
        )
        if index.image_policy["applied"] not in ("preparation", "loading"):
            raise ValueError(f"image_policy.applied is {index.image_policy['applied']!r}")
        if not isinstance(index.image_policy["buckets"], list):
            raise ValueError(f"image_policy.buckets is {index.image_policy['buckets']!r}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: a key is missing or of the wrong type: {error}") from error
    if not index.classes:
        raise InputError(f"{path}: there are no classes")
    if listed and (fault := entries_fault(folder, index)):
        raise InputError(fault)
    return index


def entries_fault(folder: Path, index: Index) -> str:
    """What is wrong with the entries of an index, or the digest that it has; empty if nothing is. Looks at them all,
    once: where they are a list when it is read, and else in `check_table`."""
    try:
        index.table.check(index.samples, max(1, len(index.image_policy["buckets"])))
        if index.known[0] == index.identity and index.known[1] != (found := index.computed_digest()):
            raise ValueError(f"its digest is {found[:16]}…, but it lists {index.known[1][:16]}…")
    except ValueError as error:
        return f"{folder / INDEX_NAME}: {error}"
    return ""


def _table(folder: Path, about: dict[str, Any]) -> Shards:
    path = folder / SHARDS_NAME
    if size_of(path) is None:
        raise InputError(f"{path} is missing, but {folder / INDEX_NAME} needs it")
    try:
        table = Shards(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', '') or error}") from error
    if (len(table.files), len(table)) != (as_count(about["files"]), as_count(about["entries"])):
        raise InputError(
            f"{path} has {len(table.files)} tar files and {len(table)} entries, but {folder / INDEX_NAME} lists "
            f"{about['files']} and {about['entries']}; prepare the folder again"
        )
    table.sha256 = as_sha256(about["sha256"])  # checked by `check_table`, once on a node
    return table


def _no_index(folder: Path, size: str) -> str:
    """What lies at `folder` in place of an index, and the command that makes one of it."""
    if not folder.exists():
        return f"shard folder {str(folder)!r} does not exist; make one with 'data_prep write SOURCE OUT {size}'"
    if is_mix(str(folder)):
        return f"{str(folder)!r} is a mix file: expected one shard folder; give its sets one by one"
    without = f"shard folder {str(folder)!r} has no {INDEX_NAME}: "
    if (folder / "plan.json").is_file():
        return f"{without}its preparation did not finish; run the same 'data_prep' command again"
    shown, beside = shlex.quote(str(folder)), str(folder).rstrip("/").removesuffix(".tar")
    what = _kind_of(folder)
    if what == TAR_FILES:
        index = shlex.quote(f"{beside}-index")
        return f"{without}it holds tar files; make an index with: data_prep index {shown} --out {index} {size}"
    if what:
        out = shlex.quote(f"{beside}-shards")
        return f"{without}it holds {what}; make shards with: data_prep write {shown} {out} {size}"
    empty = "it is empty" if folder.is_dir() and not any(folder.iterdir()) else "it holds nothing that is read"
    return (
        f"{without}{empty}; make shards with 'data_prep write SOURCE OUT {size}', or an index over tar files with "
        f"'data_prep index SHARDS --out INDEX {size}'"
    )


def _kind_of(place: Path) -> str:
    """What can be prepared of a file, or of a folder's first entries and those below; empty if nothing is known."""
    names = list(islice(_names(place), LOOKED_AT))
    if place.is_file() and re.search(PREPARED["images"], place.name):
        return ""  # one image is no data set
    return next((kind for kind, ending in PREPARED.items() if any(re.search(ending, name) for name in names)), "")


def _names(place: Path) -> Iterator[str]:
    if not place.is_dir():
        yield from [place.name] if place.is_file() else []
        return
    for _, folders, files in os.walk(place):
        folders.sort()
        yield from sorted(files)


def _listed_entries(data: Any) -> Shards:
    return Shards.of([_shard_entry(entry) for entry in data])


def _shard_entry(data: dict[str, Any]) -> ShardEntry:
    check_name(name := as_text(data["name"]))
    samples, size, bucket = (as_count(data[key]) for key in ("samples", "bytes", "bucket"))
    return ShardEntry(name, samples, size, as_sha256(data["sha256"]), bucket)


def missing_shards(base: Path, index: Index) -> list[str]:
    """What is wrong with each local tar file that is not there with the size that the index lists; reads no data."""
    faults = []
    for shard in index.files:
        path = base / shard.name
        if (size := size_of(path)) is None:
            faults.append(f"{path} is missing, but {INDEX_NAME} lists it")
        elif size != shard.bytes:
            faults.append(
                f"{path} has {size} bytes, but {INDEX_NAME} lists {shard.bytes}: "
                "the index does not match its shards; prepare the folder again"
            )
    return faults


# ---------------------------------------------------------------------------------------------------------------------
# Values of JSON that may come from a stranger
# ---------------------------------------------------------------------------------------------------------------------


def as_count(value: Any, least: int = 0) -> int:
    """A whole number from `least` to LARGEST_COUNT; ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST_COUNT:
        raise ValueError(f"{value!r} is not a count")
    return value


def as_text(value: Any) -> str:
    """A text; ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def as_sha256(value: Any) -> str:
    """A SHA-256 hash in hexadecimal; ValueError for anything else."""
    if not re.fullmatch("[0-9a-f]{64}", as_text(value)):
        raise ValueError(f"{value!r} is not a SHA-256 hash")
    return str(value)
