"""`samples.bin` and `captions.bin`: where each sample of a shard folder lies, and its captions.

`samples.bin` holds one record per sample, little endian, 36 bytes (`SampleRecord`). It says where the image lies, so
that a reader gets any sample with one read. `captions.bin` holds the samples' captions in the same order, UTF-8, end to
end; those of one sample are one text (`captions.py`). All that read them, and what writes them, go through this file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.files import sha256_of, size_of
from megapix.shards.captions import SEPARATOR, Caption, unpack
from megapix.shards.index import CAPTIONS_NAME, INDEX_NAME, TABLE_NAME, Index
from megapix.shards.storage import Local

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
    """SHA-256 of `samples.bin` and `captions.bin` by name, as the index lists them."""
    return {TABLE_NAME: index.table_sha256, CAPTIONS_NAME: index.captions_sha256}


def check_table(folder: str | Path, index: Index) -> None:
    """Check that `samples.bin` and `captions.bin` have the size and hash that the index lists.

    Raises:
        InputError: naming the file, with both values. StorageError: one cannot be read now.
    """
    for name, sha256 in hashes(index).items():
        path = Path(folder) / name
        if size_of(path) is None:
            raise InputError(f"{path} is missing, but {Path(folder) / INDEX_NAME} needs it")
        if (found := sha256_of(path)) != sha256:
            raise InputError(
                f"{path} has sha256 {found[:16]}…, but {Path(folder) / INDEX_NAME} lists {sha256[:16]}…: "
                "the index does not match its shards; prepare the folder again"
            )
    table, expected = Path(folder) / TABLE_NAME, index.samples * RECORD.size
    if (size := size_of(table)) != expected:
        raise InputError(f"{table} has {size} bytes, expected {expected} ({index.samples} samples of {RECORD.size})")


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
        chosen = self.columns[start:stop]
        for at in range(0, len(chosen), PART):
            yield from (SampleRecord(*fields) for fields in chosen[at : at + PART].tolist())

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
        first = sum(entry.samples for entry in self._index.shards[:place])
        samples = range(first, first + self._index.shards[place].samples)
        return [[caption.text for caption in self.of(sample)] for sample in samples]

    def count(self) -> int:
        """Captions of all samples."""
        separators = 0
        with open(self._path, "rb") as packed:
            while data := packed.read(1 << 20):
                separators += data.count(SEPARATOR.encode())
        return len(self._table) + separators
