"""Reads the text features of any caption, as `text_features.py` describes their files: one read per caption.

The tables of a file are mapped once, and checked as a whole then; the features of each caption are checked by its CRC.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.files import size_of
from megapix.outage import persist
from megapix.shards.feature_file import EntryFiles
from megapix.shards.text_features import BF16, INT, TextFeatures, TextFile, header, table_bytes


class _Tables(NamedTuple):
    """The tables of a file, and where its features begin."""

    first: NDArray[np.int64]
    starts: NDArray[np.int64]
    crc32: NDArray[np.int64]
    begin: int


class TextFeatureReader:
    """Reads the features of any caption; each process needs its own."""

    def __init__(self, features: TextFeatures) -> None:
        self.features = features
        self._files = EntryFiles(features.folder, (file.samples for file in features.files), "data_prep embed-text")
        self._mapped: dict[str, _Tables] = {}
        self._empty: NDArray[np.int16] | None = None

    def captions(self, sample: int) -> int:
        """How many captions of a sample there are.

        Raises:
            InputError: the file's tables cannot be read, or are not those that were written.
        """
        place, row = self._files.find(sample)
        first = self._tables(self.features.files[place]).first
        return int(first[row + 1] - first[row])

    def read(self, sample: int, caption: int) -> NDArray[np.int16]:
        """Features of a sample's caption, counted from 0: bf16's bit patterns [tokens, width], read-only.

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        place, row = self._files.find(sample)
        file = self.features.files[place]
        tables = self._tables(file)
        there = int(tables.first[row + 1] - tables.first[row])
        if not 0 <= caption < there:
            raise InputError(
                f"{self._files.where(file.name)}: sample {sample} has {there} captions there, but caption {caption} "
                "was asked for"
            )
        return self._read(file, tables, int(tables.first[row]) + caption, f"sample {sample}, caption {caption}")

    def empty(self) -> NDArray[np.int16]:
        """Features of the caption "": bf16's bit patterns [tokens, width], read-only.

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        if self._empty is None:
            file = self.features.empty
            self._empty = self._read(file, self._tables(file), 0, "the empty caption")
        return self._empty

    def _read(self, file: TextFile, tables: _Tables, caption: int, shown: str) -> NDArray[np.int16]:
        start, end = (int(number) for number in tables.starts[caption : caption + 2])
        at, size, crc = (
            tables.begin + start * self.features.row,
            (end - start) * self.features.row,
            tables.crc32[caption],
        )
        data = self._files.read_checked(file.name, at, size, int(crc), f"the features of {shown}")
        return np.frombuffer(data, BF16).reshape(end - start, self.features.recipe.width)

    def _tables(self, file: TextFile) -> _Tables:
        """Those of a file, mapped: the pages are shared by all processes of a machine."""
        if file.name not in self._mapped:
            path = self.features.folder / file.name
            begin = len(header(self.features.recipe, self.features.data_digest, file))
            try:
                if size_of(path) != self.features.bytes_of(file):
                    raise InputError(f"{self.features.fault(file)}; run its 'data_prep embed-text' command again")
                length = table_bytes(file) // INT.itemsize
                mapped = np.asarray(persist(path, lambda: np.memmap(path, INT, "r", begin, (length,))))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
            first, starts, crcs = np.split(mapped, np.cumsum([file.samples + 1, file.captions + 1]))
            if zlib.crc32(mapped.data) != file.tables or not self._sound(file, first, starts):
                raise self._files.not_written(file.name, "its tables")
            self._mapped[file.name] = _Tables(first, starts, crcs, begin + table_bytes(file))
        return self._mapped[file.name]

    def _sound(self, file: TextFile, first: NDArray[np.int64], starts: NDArray[np.int64]) -> bool:
        """Whether each caption is a few tokens of this file: an index may come from a stranger."""
        ends = first[0] == starts[0] == 0 and first[-1] == file.captions and starts[-1] == file.tokens
        lengths = np.diff(starts)
        most = self.features.recipe.max_tokens
        limited = (lengths >= (most if self.features.recipe.attended else 1)) & (lengths <= most)
        return bool(ends and (np.diff(first) >= 0).all() and limited.all())
