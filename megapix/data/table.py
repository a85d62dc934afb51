"""`samples.bin` as a NumPy array that is read as it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapix.shards import RECORD, TABLE_NAME, Index

RECORD_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("size", "<u4"),
        ("offset", "<u8"),
        ("label", "<i4"),
        ("crc", "<u4"),
        ("caption_offset", "<u8"),
        ("caption_size", "<u4"),
    ]
)
assert RECORD_DTYPE.itemsize == RECORD.size


def open_table(folder: Path, index: Index) -> NDArray[Any]:
    """The records of all samples, fields as in `megapix.shards.SampleRecord`."""
    return np.memmap(folder / TABLE_NAME, dtype=RECORD_DTYPE, mode="r", shape=(index.samples,))
