"""Random access to the images of a shard folder: one `pread` a sample, checked against its tar header."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from megapix.errors import InputError
from megapix.shards import RECORD, TABLE_NAME, TAR_BLOCK, Index, SampleRecord

RECORD_DTYPE = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4"), ("name_crc", "<u4")])
assert RECORD_DTYPE.itemsize == RECORD.size
MAX_OPEN_SHARDS = 64
"""Open files of one process: shards are opened when needed, and the least recently used is closed."""


class ShardReader:
    """Reads the encoded image and the label of any sample; each process needs its own."""

    def __init__(self, folder: str | Path, index: Index) -> None:
        self.folder = Path(folder)
        self.index = index
        self.table = np.memmap(self.folder / TABLE_NAME, dtype=RECORD_DTYPE, mode="r", shape=(index.samples,))
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, sample: int) -> dict[str, bytes | str]:
        """The WebDataset sample: `__key__`, `__url__`, the image under its extension, and `cls`.

        Raises:
            InputError: the shard cannot be opened, or the bytes at the recorded offset are not this sample's.
        """
        record = SampleRecord(*self.table[sample].tolist())
        path = self.folder / self.index.shards[record.shard].name
        start = record.offset - TAR_BLOCK
        try:
            data = os.pread(self._open(record.shard, path), TAR_BLOCK + record.size, start)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        name = data[:100].rstrip(b"\0")
        if zlib.crc32(name) != record.name_crc or len(data) != TAR_BLOCK + record.size:
            raise InputError(
                f"{path}: sample {sample}: expected an image of {record.size} bytes with its header at byte {start}, "
                f"found {name.decode('ascii', 'replace')!r}: the index does not match its shards; "
                "prepare the folder again"
            )
        key = name.decode().rpartition("/")[2].partition(".")[0]
        label = str(record.label).encode()
        return {"__key__": key, "__url__": str(path), self.index.image_extension: data[TAR_BLOCK:], "cls": label}

    def _open(self, shard: int, path: Path) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(path, os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close the open shards."""
        while self._files:
            os.close(self._files.popitem()[1])
