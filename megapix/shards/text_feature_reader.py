"""Reads the text features of any caption, as `text_features.py` describes their files: one read per caption.

The tables of a file are checked as a whole when it is first needed; what is needed of them is read then. So a reader
holds a bit for each file, and as many descriptors as `storage.Local` keeps open, whatever the number of files. The
features of each caption are checked by its CRC.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.files import size_of
from megapix.shards.feature_file import EntryFiles, again
from megapix.shards.text_features import BF16, INT, KIND, TextFeatures, TextFile, table_bytes


class TextFeatureReader:
    """Reads the features of any caption; each process needs its own."""

    def __init__(self, features: TextFeatures) -> None:
        self.features = features
        self._files = EntryFiles(features.folder, KIND)
        self._checked = np.zeros(len(features.files) + 1, np.bool_)
        """Whether the tables of each file, and of the empty caption's, are known to be sound."""
        self._empty: NDArray[np.int16] | None = None

    def captions(self, sample: int) -> int:
        """How many captions of a sample there are.

        Raises:
            InputError: the file's tables cannot be read, or are not those that were written.
        """
        first, end = self._captions_of(sample)[1:]
        return end - first

    def read(self, sample: int, caption: int) -> NDArray[np.int16]:
        """Features of a sample's caption, counted from 0: bf16's bit patterns [tokens, width], read-only.

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        file, first, end = self._captions_of(sample)
        if not 0 <= caption < end - first:
            raise InputError(
                f"{self._files.where(file.name)}: sample {sample} has {end - first} captions there, but caption "
                f"{caption} was asked for"
            )
        return self._read(file, first + caption, f"sample {sample}, caption {caption}")

    def empty(self) -> NDArray[np.int16]:
        """Features of the caption "": bf16's bit patterns [tokens, width], read-only.

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        if self._empty is None:
            file = self.features.empty
            self._check(len(self.features.files), file)
            self._empty = self._read(file, 0, "the empty caption")
        return self._empty

    def _captions_of(self, sample: int) -> tuple[TextFile, int, int]:
        """(file, first caption of a sample, the one after its last), counted in the file."""
        place, row = self.features.table.find(sample)
        file = self.features.files[place]
        self._check(place, file)
        first, end = self._numbers(file, row, 2)
        return file, first, end

    def _read(self, file: TextFile, caption: int, shown: str) -> NDArray[np.int16]:
        starts = file.samples + 1 + caption
        start, end = self._numbers(file, starts, 2)
        (crc,) = self._numbers(file, starts + file.captions + 1, 1)
        if not 0 <= start < end <= min(file.tokens, start + self.features.recipe.max_tokens):  # written since
            raise self._files.not_written(file.name, "its tables")
        at, row = self._begin(file) + table_bytes(file), self.features.row
        data = self._files.read_checked(
            file.name, at + start * row, (end - start) * row, crc, f"the features of {shown}"
        )
        return np.frombuffer(data, BF16).reshape(end - start, self.features.recipe.width)

    def _begin(self, file: TextFile) -> int:
        return len(self.features.header(file))

    def _numbers(self, file: TextFile, start: int, count: int) -> list[int]:
        """`count` numbers of a file's tables, from number `start` on."""
        at, size = self._begin(file) + start * INT.itemsize, count * INT.itemsize
        data = self._files.read(file.name, at, size)
        if len(data) != size:
            raise self._files.not_written(file.name, "its tables")
        return [int(number) for number in np.frombuffer(data, INT)]

    def _check(self, place: int, file: TextFile) -> None:
        """Check the tables of a file, if they were not."""
        if self._checked[place]:
            return
        path = self.features.folder / file.name
        try:
            if size_of(path) != self.features.bytes_of(file):
                raise InputError(f"{self.features.fault(file)}; {again(KIND)}")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        data = self._files.read(file.name, self._begin(file), table_bytes(file))
        if len(data) == table_bytes(file) and zlib.crc32(data) == file.tables:
            ends = [file.samples + 1, file.samples + 1 + file.captions + 1]
            first, starts, _ = np.split(np.frombuffer(data, INT), ends)
            self._checked[place] = self._sound(file, first, starts)
        if not self._checked[place]:
            raise self._files.not_written(file.name, "its tables")

    def _sound(self, file: TextFile, first: NDArray[np.int64], starts: NDArray[np.int64]) -> bool:
        """Whether each caption is a few tokens of this file: an index may come from a stranger."""
        ends = first[0] == starts[0] == 0 and first[-1] == file.captions and starts[-1] == file.tokens
        lengths = np.diff(starts)
        most = self.features.recipe.max_tokens
        limited = (lengths >= (most if self.features.recipe.attended else 1)) & (lengths <= most)
        return bool(ends and (np.diff(first) >= 0).all() and limited.all())
