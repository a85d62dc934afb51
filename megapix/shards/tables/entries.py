"""`shards.bin`: the tar files of an index and its entries, for any number of them.

    header    magic, and how many tar files, entries and bytes of names there are: 8 bytes each
    files     name_end, bytes: uint64; sha256: 32 bytes         a name ends at name_end, and begins where the last ended
    entries   samples: uint64; file, bucket: uint32             in the order of their buckets
    names     of the tar files, UTF-8, end to end

All numbers are little endian. 10^6 tar files of one bucket are 80 MB, where a list in JSON has 223 MB and takes 2 GB of
objects. Nothing is held of a large table: one entry is read as it is needed, and columns in blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from megapix.shards.tables.stored import Stored

SHARDS_NAME = "shards.bin"
HEADER = struct.Struct("<8sQQQ")
MAGIC = b"MPXSHRD1"
FILE = np.dtype([("name_end", "<u8"), ("bytes", "<u8"), ("sha256", "V32")])
ENTRY = np.dtype([("samples", "<u8"), ("file", "<u4"), ("bucket", "<u4")])
PART = 1 << 18
"""Entries, or tar files, that are read in one go."""
LARGEST_COUNT = 10**15
"""What no count of samples, captions, tokens or bytes in a file of ours exceeds."""


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


class TarFile(NamedTuple):
    """A tar file, whatever the buckets of its samples."""

    name: str
    bytes: int
    sha256: str


class Shards(Stored, Sequence[ShardEntry]):
    """The entries of an index, and their tar files.

    Args:
        table: `shards.bin`, or its bytes.

    Raises:
        ValueError: it is not such a table. InputError, StorageError, OSError: it cannot be read.
    """

    def __init__(self, table: Path | bytes) -> None:
        super().__init__(table, HEADER.size)
        self._sizes = self._checked_sizes()

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> Shards:
        """The table of those entries, in memory; of a table, itself."""
        if isinstance(entries, Shards):
            return entries
        files: dict[TarFile, int] = {}
        rows = [
            (entry.samples, files.setdefault(TarFile(entry.name, entry.bytes, entry.sha256), len(files)), entry.bucket)
            for entry in entries
        ]
        return cls.made_of(list(files), np.array(rows, ENTRY))

    @classmethod
    def made_of(cls, files: Sequence[TarFile], entries: NDArray[Any]) -> Shards:
        """The table of those tar files and records of entries (`ENTRY`), in memory."""
        names = [file.name.encode() for file in files]
        table = np.zeros(len(files), FILE)
        table["name_end"] = np.cumsum([len(name) for name in names], dtype=np.uint64)
        table["bytes"] = [file.bytes for file in files]
        hashes = b"".join(bytes.fromhex(file.sha256) for file in files)
        table["sha256"] = np.frombuffer(hashes, FILE["sha256"])
        header = HEADER.pack(MAGIC, len(files), len(entries), sum(map(len, names)))
        return cls(b"".join((header, table.tobytes(), entries.tobytes(), *names)))

    def _checked_sizes(self) -> tuple[int, int, int]:
        if len(self.header) < HEADER.size or not self.header.startswith(MAGIC):
            raise ValueError("it does not begin as a table of shards does")
        _, files, entries, names = HEADER.unpack(self.header)
        expected = HEADER.size + files * FILE.itemsize + entries * ENTRY.itemsize + names
        if self.size != expected or not files or not entries:
            raise ValueError(f"it has {self.size} bytes, expected {expected} ({files} tar files, {entries} entries)")
        return files, entries, names

    # -----------------------------------------------------------------------------------------------------------------
    # One entry
    # -----------------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self._sizes[1]

    @overload
    def __getitem__(self, place: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[ShardEntry, ...]: ...
    def __getitem__(self, place: int | slice) -> ShardEntry | tuple[ShardEntry, ...]:
        found = range(len(self))[place]
        if not isinstance(found, int):
            return tuple(self[n] for n in found)
        samples, file, bucket = self._records(ENTRY, found, 1)[0].tolist()
        about = self.file(file)
        return ShardEntry(about.name, samples, about.bytes, about.sha256, bucket)

    def file(self, number: int) -> TarFile:
        """A tar file by its number.

        Raises:
            IndexError: there is none of that number. ValueError: its name leads out of the folder.
        """
        found = range(self._sizes[0])[number]
        records = self._records(FILE, max(0, found - 1), 1 + (found > 0))
        start = int(records[0]["name_end"]) if found else 0
        _, size, sha256 = records[-1].tolist()
        name = self.read(self._at_names + start, int(records[-1]["name_end"]) - start).decode()
        check_name(name)
        return TarFile(name, size, sha256.hex())

    # -----------------------------------------------------------------------------------------------------------------
    # All of them
    # -----------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[ShardEntry]:
        files = np.concatenate(list(self._parts(FILE)))
        names, ends = self.read(self._at_names, self._sizes[2]), np.concatenate([[0], files["name_end"].astype(int)])
        for part in self._parts(ENTRY):
            for samples, file, bucket in part.tolist():
                _, size, sha256 = files[file].item()
                name = names[ends[file] : ends[file + 1]].decode()
                check_name(name)
                yield ShardEntry(name, samples, size, sha256.hex(), bucket)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Shards):
            return self.sha256 == other.sha256
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list, which it is equal to

    def __repr__(self) -> str:
        return f"<{len(self)} entries of {self._sizes[0]} tar files>"

    @property
    def files(self) -> Sequence[TarFile]:
        """The tar files, in the order in which the entries name them first."""
        return _Files(self)

    @property
    def samples(self) -> NDArray[np.int64]:
        """Of each entry: int64 [entries]."""
        return self._column("samples")

    @property
    def buckets(self) -> NDArray[np.int64]:
        """Of each entry: int64 [entries]."""
        return self._column("bucket")

    @property
    def first(self) -> NDArray[np.int64]:
        """The number of the first sample of each entry, and the end: int64 [entries + 1]."""
        first = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.samples, out=first[1:])
        return first

    @property
    def file_bytes(self) -> NDArray[np.int64]:
        """Of each tar file: int64 [files]."""
        return np.concatenate([part["bytes"].astype(np.int64) for part in self._parts(FILE)])

    @property
    def tar_bytes(self) -> NDArray[np.int64]:
        """Of the tar file of each entry: int64 [entries]."""
        return self.file_bytes[self._column("file")]

    def bucket_samples(self) -> dict[int, int]:
        """Bucket -> its samples, of those that have any entry, in order."""
        counts: dict[int, int] = {}
        for part in self._parts(ENTRY):
            numbers, starts = np.unique(part["bucket"], return_index=True)
            for bucket, count in zip(numbers.tolist(), np.add.reduceat(part["samples"], starts).tolist(), strict=True):
                counts[bucket] = counts.get(bucket, 0) + count
        return counts

    def check(self, samples: int, buckets: int) -> None:
        """Check all of it: names, references, order and sums.

        Args:
            samples: that the index has.
            buckets: sizes that its image policy has.

        Raises:
            ValueError: what is wrong.
        """
        files, end = self._sizes[0], 0
        for part in self._parts(FILE):
            ends = part["name_end"].astype(np.uint64)
            starts = np.concatenate([[np.uint64(end)], ends[:-1]])
            if (ends <= starts).any() or int(ends[-1]) > self._sizes[2] or (part["bytes"] > LARGEST_COUNT).any():
                raise ValueError("its names or sizes of tar files have no sense")
            names = self.read(self._at_names + end, int(ends[-1]) - end)
            odd = any(sign in names for sign in (b"..", b"\\", b"\0")) or not names.isascii()
            if odd or (np.frombuffer(names, np.uint8)[(starts - np.uint64(end)).astype(np.int64)] == ord("/")).any():
                for start, stop in pairwise([end, *ends.tolist()]):
                    check_name(names[start - end : stop - end].decode())
            end = int(ends[-1])
        if end != self._sizes[2]:
            raise ValueError("its names of tar files have no sense")
        total, highest = 0, 0
        for part in self._parts(ENTRY):
            if (part["samples"] > LARGEST_COUNT).any() or (part["file"] >= files).any():
                raise ValueError("an entry has no tar file, or too many samples")
            total += int(part["samples"].sum())
            if part["bucket"][0] < highest or (np.diff(part["bucket"].astype(np.int64)) < 0).any():
                raise ValueError("the shards are not in the order of their buckets")
            highest = int(part["bucket"][-1])
        if total != samples or samples < 1:
            raise ValueError(f"samples is {samples}, but its shards hold {total}; expected the same, above 0")
        if highest >= buckets:
            raise ValueError(f"a shard has bucket {highest}, but the image policy has {buckets}")

    @property
    def _at_names(self) -> int:
        return self.size - self._sizes[2]

    def _column(self, field: str) -> NDArray[np.int64]:
        found, start = np.empty(len(self), np.int64), 0
        for part in self._parts(ENTRY):
            found[start : start + len(part)] = part[field]
            start += len(part)
        return found

    def _parts(self, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        count = self._sizes[dtype is ENTRY]
        for start in range(0, count, PART):
            yield self._records(dtype, start, min(PART, count - start))

    def _records(self, dtype: np.dtype[Any], start: int, count: int) -> NDArray[Any]:
        begin = HEADER.size + (self._sizes[0] * FILE.itemsize if dtype is ENTRY else 0)
        return np.frombuffer(self.read(begin + start * dtype.itemsize, count * dtype.itemsize), dtype)


class _Files(Sequence[TarFile]):
    """The tar files of a table."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return self._shards._sizes[0]

    @overload
    def __getitem__(self, number: int) -> TarFile: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[TarFile, ...]: ...
    def __getitem__(self, number: int | slice) -> TarFile | tuple[TarFile, ...]:
        found = range(len(self))[number]
        return self._shards.file(found) if isinstance(found, int) else tuple(self[n] for n in found)

    def __iter__(self) -> Iterator[TarFile]:
        end = 0
        for part in self._shards._parts(FILE):
            names = self._shards.read(self._shards._at_names + end, int(part["name_end"][-1]) - end)
            first = begin = end
            for end, size, sha256 in part.tolist():
                name = names[begin - first : end - first].decode()
                check_name(name)
                yield TarFile(name, size, sha256.hex())
                begin = end


def check_name(name: str) -> None:
    """An index may come from a stranger: its shards lie below its base, and nowhere else; ValueError if not."""
    if not name or name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise ValueError(f"shard name {name!r} leads out of the folder")
