"""`text-files.bin` and `features-files.bin`: what is known of each file of features, for any number of them.

    header     magic and number of files: 8 bytes each; SHA-256 of what the features are of: 32 bytes
    records    one for each entry of the index, in its order: the file's counts, uint64 each

All numbers are little endian. A file's name follows from its place, and its bytes from its counts. 10^6 files of text
features are 40 MB, where a list in JSON has 162 MB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from megapix.shards.tables.entries import LARGEST_COUNT
from megapix.shards.tables.stored import Stored

HEADER = struct.Struct("<8sQ32s")
STEP, PART = 1 << 7, 1 << 14
"""Files, of which the first one's first sample is held; files that are read in one go."""

F = TypeVar("F", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Kind(Generic[F]):
    """A kind of features."""

    name: str
    """What names of its files begin with."""
    file: Callable[..., F]
    """What is known of a file: its name, then its counts."""
    counts: tuple[str, ...]
    """What is counted; "samples" first."""
    positive: tuple[str, ...]
    """Which of it is never 0."""
    listed_in: str
    """Name of the file that lists them."""
    command: str
    """What writes them."""

    @property
    def table(self) -> str:
        """Name of the table."""
        return f"{self.name}-files.bin"

    @property
    def magic(self) -> bytes:
        """What a table begins with."""
        return f"MPX{self.name[:4].upper()}1".encode()

    @property
    def record(self) -> np.dtype[Any]:
        """A file's counts as they lie in the table."""
        return np.dtype([(count, "<u8") for count in self.counts])


class Files(Stored, Sequence[F]):
    """The files of features of the entries of an index.

    Args:
        table: its file, or its bytes.

    Raises:
        ValueError: it is not such a table. StorageError, OSError: it cannot be read.
    """

    def __init__(self, kind: Kind[F], table: Path | bytes) -> None:
        super().__init__(table, HEADER.size)
        self.kind = kind
        if len(self.header) < HEADER.size or not self.header.startswith(kind.magic):
            raise ValueError("it does not begin as a table of files of features does")
        _, self._count, origin = HEADER.unpack(self.header)
        self.origin = origin.hex()
        """SHA-256 of what the features are of."""
        expected = HEADER.size + self._count * kind.record.itemsize
        if self.size != expected:
            raise ValueError(f"it has {self.size} bytes, expected {expected} ({self._count} files)")

    @classmethod
    def of(cls, kind: Kind[F], origin: str, files: Sequence[F]) -> Files[F]:
        """The table of those files, in memory; of a table, itself.

        Raises:
            ValueError: a file is not named by its place.
        """
        if isinstance(files, Files):
            return files
        for place, (name, *_) in enumerate(files):
            if name != (expected := file_name(kind.name, place)):
                raise ValueError(f"file {place} is named {name!r}, expected {expected!r}")
        counts = [np.array([file[number] for file in files], np.uint64) for number in range(1, 1 + len(kind.counts))]
        return cls.made_of(kind, origin, counts)

    @classmethod
    def made_of(cls, kind: Kind[F], origin: str, counts: Sequence[NDArray[Any]]) -> Files[F]:
        """The table of files with those counts, each [files], in memory."""
        records = np.empty(len(counts[0]), kind.record)
        for name, column in zip(kind.counts, counts, strict=True):
            records[name] = column
        return cls(kind, HEADER.pack(kind.magic, len(records), bytes.fromhex(origin)) + records.tobytes())

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> F: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[F, ...]: ...
    def __getitem__(self, place: int | slice) -> F | tuple[F, ...]:
        found = range(len(self))[place]
        if not isinstance(found, int):
            return tuple(self[n] for n in found)
        return self._file(found, self._records(found, 1)[0].tolist())

    def __iter__(self) -> Iterator[F]:
        for start, part in self._parts():
            for place, counts in enumerate(part.tolist(), start):
                yield self._file(place, counts)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Files):
            return self.sha256 == other.sha256
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as a list, which it is equal to

    def find(self, sample: int) -> tuple[int, int]:
        """(place of the file that holds a sample, its number in there)."""
        step = int(np.searchsorted(self._firsts, sample, "right")) - 1
        start, inside = step * STEP, sample - int(self._firsts[step])
        ends = np.cumsum(self._records(start, min(STEP, len(self) - start))["samples"].astype(np.int64))
        place = int(np.searchsorted(ends, inside, "right"))
        return start + place, inside - (int(ends[place - 1]) if place else 0)

    def total(self, count: str) -> int:
        """That count of all files."""
        return sum(int(part[count].sum()) for _, part in self._parts())

    def fault(self, samples: NDArray[np.int64]) -> str:
        """What is wrong with its counts; empty if nothing is.

        Args:
            samples: of each entry of the index.
        """
        if len(self) != len(samples):
            return f"{len(self)} files for {len(samples)} entries"
        for start, part in self._parts():
            for count in self.kind.counts:
                wrong = (part[count] < int(count in self.kind.positive)) | (part[count] > LARGEST_COUNT)
                if wrong.any():
                    place = int(wrong.argmax())
                    return f"{file_name(self.kind.name, start + place)} has {int(part[count][place])} {count}"
            if (wrong := part["samples"] != samples[start : start + len(part)]).any():
                place = int(wrong.argmax())
                name, found, expected = file_name(self.kind.name, start + place), part["samples"], samples[start:]
                return f"{name} has {int(found[place])} samples, but its entry {int(expected[place])}"
        return ""

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """The first sample of every STEP-th file."""
        found, first = list[NDArray[np.int64]](), 0
        for _, part in self._parts():
            samples = part["samples"].astype(np.int64)
            ends = first + np.cumsum(samples)
            found.append((ends - samples)[::STEP])
            first = int(ends[-1])
        return np.concatenate(found)

    def _file(self, place: int, counts: Sequence[int]) -> F:
        return self.kind.file(file_name(self.kind.name, place), *counts)

    def _parts(self) -> Iterator[tuple[int, NDArray[Any]]]:
        for start in range(0, len(self), PART):
            yield start, self._records(start, min(PART, len(self) - start))

    def _records(self, start: int, count: int) -> NDArray[Any]:
        record = self.kind.record
        data = self.read(HEADER.size + start * record.itemsize, count * record.itemsize)
        return np.frombuffer(data, record)


def file_name(kind: str, place: int) -> str:
    """Name of an entry's file, by its place in the index's list; `kind` is "features" or "text"."""
    return f"{kind}-{place:06d}.safetensors"
