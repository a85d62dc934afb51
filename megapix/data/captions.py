"""Random access to the captions of an index; no tar file is opened for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from megapix.captions import Caption, unpack
from megapix.data.table import open_table
from megapix.errors import InputError
from megapix.shards import CAPTIONS_NAME, Index, SampleRecord


class Captions:
    """Reads the captions of any sample; each process needs its own.

    Args:
        folder: local folder of the index.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self._path, self._table = folder / CAPTIONS_NAME, open_table(folder, index)

    def of(self, sample: int) -> tuple[Caption, ...]:
        """The sample's captions: one at least, which is empty where there is none.

        Raises:
            InputError: they do not lie in `captions.bin`, or cannot be told apart.
        """
        record = SampleRecord(*self._table[sample].tolist())
        text = self._bytes[record.caption_offset : record.caption_offset + record.caption_size].tobytes()
        try:
            if len(text) != record.caption_size:
                raise ValueError(
                    f"{record.caption_size} bytes at byte {record.caption_offset} are past its end; prepare the folder "
                    "again"
                )
            return unpack(text.decode())
        except ValueError as error:
            raise InputError(f"{self._path}: the captions of sample {sample}: {error}") from error

    @cached_property
    def _bytes(self) -> NDArray[Any]:
        """The captions end to end, mapped when they are asked for."""
        if not self._path.stat().st_size:  # no sample has a caption, and nothing cannot be mapped
            return np.zeros(0, np.uint8)
        return np.memmap(self._path, dtype=np.uint8, mode="r")


class FirstCaptions(Sequence[str]):
    """The first caption of every sample of an index, read when it is asked for; arguments and errors of `Captions`."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._captions, self._samples = Captions(folder, index), index.samples

    def __len__(self) -> int:
        return self._samples

    @overload
    def __getitem__(self, sample: int) -> str: ...
    @overload
    def __getitem__(self, sample: slice) -> tuple[str, ...]: ...
    def __getitem__(self, sample: int | slice) -> str | tuple[str, ...]:
        found = range(self._samples)[sample]
        return self._captions.of(found)[0].text if isinstance(found, int) else tuple(self[n] for n in found)
