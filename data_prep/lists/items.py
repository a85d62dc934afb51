"""The samples of a source as a sequence that takes few bytes of memory for each, whatever their captions are.

They lie in a temporary file, in their order, and come out of it as they are asked for.
"""

from __future__ import annotations

import marshal
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from data_prep.listing.base import Item

BLOCK = 4096
"""Samples that are read together where all are asked for."""


class Items(Sequence[Item]):
    """Samples, added once and then read; 12 bytes of memory each.

    Where their classes are known only when all labels are, they are added with the number of a label, which `settle`
    turns into a class.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Begin without any.

        Args:
            folder: where the file lies, without a name; by default where the system has temporary files.
        """
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with this object
        self._ends = array("Q", [0])
        self._labels = array("i")
        self._settled: Sequence[tuple[int, str]] | None = None
        self._texts: dict[str, int] = {}
        self._by_number: list[str] = []
        self._written = True

    def add(self, item: Item) -> None:
        """Add a sample."""
        name, label, caption, place, chunk, about, fault = item
        file, rest = (self._number(place[0]), place[1:]) if place and isinstance(place[0], str) else (-1, place)
        record = marshal.dumps((name, caption, file, rest, self._number(chunk) if chunk else -1, about, fault))
        self._file.write(record)
        self._ends.append(self._ends[-1] + len(record))
        self._labels.append(label)
        self._written = False

    def settle(self, classes: Sequence[tuple[int, str]]) -> None:
        """Say what the labels are.

        Args:
            classes: (class number, why the sample is rejected) of each number of a label; -1 is that of samples with a
                fault, which stay as they are.
        """
        self._settled = classes

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, n: int) -> Item: ...
    @overload
    def __getitem__(self, n: slice) -> list[Item]: ...

    def __getitem__(self, n: int | slice) -> Item | list[Item]:
        if isinstance(n, slice):
            start, stop, step = n.indices(len(self))
            return list(self._between(start, stop)) if step == 1 else [self[one] for one in range(start, stop, step)]
        if not -len(self) <= n < len(self):
            raise IndexError(n)
        n %= len(self)
        return self._item(n, self._read(self._ends[n], self._ends[n + 1]))

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), BLOCK):
            yield from self._between(start, min(start + BLOCK, len(self)))

    def _between(self, start: int, stop: int) -> Iterator[Item]:
        if start < stop:
            first, data = self._ends[start], memoryview(self._read(self._ends[start], self._ends[stop]))
            for n in range(start, stop):
                yield self._item(n, data[self._ends[n] - first : self._ends[n + 1] - first])

    def _read(self, start: int, stop: int) -> bytes:
        if not self._written:
            self._file.flush()
            self._written = True
        return os.pread(self._file.fileno(), stop - start, start)

    def _item(self, n: int, record: bytes | memoryview) -> Item:
        name, caption, file, rest, chunk, about, fault = marshal.loads(record)
        place: tuple[Any, ...] = (self._by_number[file], *rest) if file >= 0 else rest
        label = self._labels[n]
        if self._settled is not None:
            label, why = self._settled[label] if label >= 0 else (0, "")
            fault = fault or why
        return Item(name, label, caption, place, self._by_number[chunk] if chunk >= 0 else "", about, fault)

    def _number(self, text: str) -> int:
        number = self._texts.setdefault(text, len(self._by_number))
        if number == len(self._by_number):
            self._by_number.append(text)
        return number


class Some(Sequence[Item]):
    """Some samples of a sequence, in the order of their places; 8 bytes each."""

    def __init__(self, items: Sequence[Item], places: Sequence[int] | NDArray[np.int64]) -> None:
        self.items, self.places = items, np.asarray(places, np.int64)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, n: int) -> Item: ...
    @overload
    def __getitem__(self, n: slice) -> list[Item]: ...

    def __getitem__(self, n: int | slice) -> Item | list[Item]:
        if isinstance(n, slice):
            return [self.items[place] for place in self.places[n].tolist()]
        return self.items[int(self.places[n])]

    def __iter__(self) -> Iterator[Item]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]


def made_in(folder: Path | None) -> Path | None:
    """The folder for a list's file, which is made; None takes the system's."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return folder
