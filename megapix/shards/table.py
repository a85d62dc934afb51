"""`samples.bin` and `captions.bin`: where each sample of a shard folder lies, and its captions.

`samples.bin` holds one record per sample, little endian, 36 bytes (`SampleRecord`). It says where the image lies, so
that a reader gets any sample with one read. `captions.bin` holds the samples' captions in the same order, UTF-8, end to
end; those of one sample are one text (`captions.py`). All that read them, and what writes them, go through this file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.files import sha256_of, size_of
from megapix.shards.captions import SEPARATOR, Caption, unpack
from megapix.shards.index import CAPTIONS_NAME, INDEX_NAME, TABLE_NAME, TAR_BLOCK, Index, entries_fault
from megapix.shards.storage import Local
from megapix.shards.tables.entries import SHARDS_NAME
from megapix.shards.tables.stamps import once

CODES = "IIQiIQI"
"""Types of a record's fields, as `struct` and NumPy call them."""
RECORD = struct.Struct("<" + CODES)
PART = 1 << 14
"""Records that are read in one go."""


class SampleRecord(NamedTuple):
    """Where one sample's image and captions lie; the fields of a record in order."""

    shard: int
    """Place of its entry in the index's list."""
    size: int
    """Bytes of the encoded image."""
    offset: int
    """Of the image's data in the tar file."""
    label: int
    """Class number."""
    crc: int
    """CRC-32 of the image's bytes."""
    caption_offset: int
    """Of its captions in `captions.bin`."""
    caption_size: int
    """Bytes of its captions."""

    def to_bytes(self) -> bytes:
        """The record as it lies in `samples.bin`."""
        return RECORD.pack(*self)


DTYPE = np.dtype([(name, f"<{code}") for name, code in zip(SampleRecord._fields, CODES, strict=True)])


def hashes(index: Index) -> dict[str, str]:
    """SHA-256 of the index's tables by name, as it lists them; one of an older version has no `shards.bin`."""
    own = {SHARDS_NAME: index.table.sha256} if index.table.path else {}
    return own | {TABLE_NAME: index.table_sha256, CAPTIONS_NAME: index.captions_sha256}


def check_table(folder: str | Path, index: Index, captions: bool = True, records: bool = False) -> None:
    """Check that the tables of an index have the sizes and hashes that it lists, and what `shards.bin` says; once on
    a node, until a file changes (`tables/stamps.py`).

    Args:
        captions: look at `captions.bin`, too.
        records: check that each record points into its shard and at a class that there is.

    Raises:
        InputError: naming the file, with both values. StorageError: one cannot be read now.
    """
    folder = Path(folder)
    for name, sha256 in hashes(index).items():
        if name == CAPTIONS_NAME and not captions:
            continue
        path, expected, of, check = folder / name, index.samples * RECORD.size, name, partial(_hash, folder / name)
        if (size := size_of(path)) is None:
            raise InputError(f"{path} is missing, but {folder / INDEX_NAME} needs it")
        if name == TABLE_NAME and size != expected:
            raise InputError(f"{path} has {size} bytes, expected {expected} ({index.samples} samples of {RECORD.size})")
        if name == SHARDS_NAME:
            check = partial(_hash_entries, folder, index)
        elif name == TABLE_NAME and records:
            of, check = f"records of {name}", partial(_hash_records, folder, index)
        once(folder, f"{of}: {sha256} {index.identity}", partial(_check, path, sha256, check), [path])


def _check(path: Path, sha256: str, read: Callable[[], tuple[str, str]]) -> None:
    found, fault = read()
    if found != sha256:
        raise InputError(
            f"{path} has sha256 {found[:16]}…, but {path.parent / INDEX_NAME} lists {sha256[:16]}…: "
            "the index does not match its shards; prepare the folder again"
        )
    if fault:
        raise InputError(fault)


def _hash(path: Path) -> tuple[str, str]:
    return sha256_of(path), ""


def _hash_entries(folder: Path, index: Index) -> tuple[str, str]:
    """The hash of the entries' table, and what is wrong with them."""
    return sha256_of(folder / SHARDS_NAME), entries_fault(folder, index)


def _hash_records(folder: Path, index: Index) -> tuple[str, str]:
    """The hash of the samples' table, and a record that points outside its shard or at no class, if there is one."""
    digest, fault = hashlib.sha256(), ""
    first, bytes_of = index.table.first, index.table.tar_bytes.astype(np.uint64)
    for start, table in Table(folder, index).blocks():
        digest.update(table.data)
        stop = start + len(table)
        low, high = np.searchsorted(first, (start, stop - 1), "right")
        entries = np.arange(low - 1, high)  # those that the block has samples of
        counts = np.diff(np.concatenate(([start], first[low:high], [stop])))
        entry, ends = np.repeat(entries, counts), np.repeat(bytes_of[entries], counts)
        # Offsets are unsigned: they are compared by what is left of the shard, so that no sum can wrap around.
        offsets, sizes = table["offset"], table["size"].astype(np.uint64)
        wrong = table["shard"] != entry
        wrong |= (offsets < TAR_BLOCK) | (offsets > ends) | (sizes > ends - np.minimum(offsets, ends))
        wrong |= (table["label"] < 0) | (table["label"] >= len(index.classes))
        if wrong.any() and not fault:
            fault = (
                f"{folder / TABLE_NAME}: record {start + int(wrong.argmax())} points outside its shard or at no class"
            )
    return digest.hexdigest(), fault and f"{fault}; prepare the folder again"


class Table:
    """The records of all samples, read as they are needed; each process needs its own.

    A record is read, and not looked up in mapped memory, where an error of the disk would end the process by SIGBUS.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._path, self._samples, self._files = folder / TABLE_NAME, index.samples, Local(folder)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> SampleRecord:
        place = range(self._samples)[sample]
        return SampleRecord(*RECORD.unpack(self._files.read(TABLE_NAME, place * RECORD.size, RECORD.size)))

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[SampleRecord]:
        """The records of samples start, …, stop - 1; of all from `start` on without `stop`."""
        for _, block in self.blocks(start, stop):
            yield from (SampleRecord(*fields) for fields in block.tolist())

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
        """(number of its first sample, records with the fields of `SampleRecord`) of each block of those samples."""
        for at in (chosen := range(self._samples)[start:stop])[::PART]:
            count = min(PART, chosen.stop - at)
            yield at, np.frombuffer(self._files.read(TABLE_NAME, at * RECORD.size, count * RECORD.size), DTYPE)

    @cached_property
    def columns(self) -> NDArray[Any]:
        """All records, with the fields of `SampleRecord`; mapped when they are asked for."""
        return np.memmap(self._path, DTYPE, "r", shape=(self._samples,))


class Captions:
    """Reads the captions of any sample, without opening a tar file; each process needs its own.

    Args:
        folder: local folder of the index.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._path, self._table, self._index = folder / CAPTIONS_NAME, Table(folder, index), index
        self._files = Local(folder)

    def of(self, sample: int) -> tuple[Caption, ...]:
        """The sample's captions: one at least, which is empty where there is none.

        Raises:
            InputError: they do not lie in `captions.bin`, or cannot be told apart.
        """
        record = self._table[sample]
        text = self._files.read(CAPTIONS_NAME, record.caption_offset, record.caption_size)
        try:
            if len(text) != record.caption_size:
                raise ValueError(
                    f"{record.caption_size} bytes at byte {record.caption_offset} are past its end; prepare the folder "
                    "again"
                )
            return unpack(text.decode())
        except ValueError as error:
            raise InputError(f"{self._path}: the captions of sample {sample}: {error}") from error

    def texts(self, place: int) -> list[list[str]]:
        """Texts of the captions of each sample of the entry at that place in the index's list; errors as in `of`."""
        samples = range(*self._first[place : place + 2].tolist())
        return [[caption.text for caption in self.of(sample)] for sample in samples]

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        return self._index.table.first

    def count(self) -> int:
        """Captions of all samples."""
        separators = 0
        with open(self._path, "rb") as packed:
            while data := packed.read(1 << 20):
                separators += data.count(SEPARATOR.encode())
        return len(self._table) + separators
