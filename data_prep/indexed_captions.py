"""The captions of a shard folder or index, an entry of the index at a time."""

from __future__ import annotations

import os
from pathlib import Path

from megapix.captions import RECORD as SEPARATOR
from megapix.captions import unpack
from megapix.errors import InputError
from megapix.shards import CAPTIONS_NAME, RECORD, TABLE_NAME, Index, SampleRecord


def captions_of(folder: Path, index: Index, place: int) -> list[list[str]]:
    """Texts of all captions of each sample of an entry.

    Raises:
        InputError: a record points outside captions.bin, or what it points at are no captions.
    """
    first = sum(entry.samples for entry in index.shards[:place])
    with open(folder / TABLE_NAME, "rb") as table, open(folder / CAPTIONS_NAME, "rb") as packed:
        rows = os.pread(table.fileno(), index.shards[place].samples * RECORD.size, first * RECORD.size)
        size = os.fstat(packed.fileno()).st_size
        found = []
        for number, fields in enumerate(RECORD.iter_unpack(rows), first):
            record = SampleRecord(*fields)
            try:
                if record.caption_offset + record.caption_size > size:
                    raise ValueError(f"it ends behind byte {size}, where the file does")
                data = os.pread(packed.fileno(), record.caption_size, record.caption_offset)
                found.append([text for text, _ in unpack(data.decode())])
            except ValueError as error:
                raise InputError(f"{folder / CAPTIONS_NAME}: the caption of sample {number}: {error}") from error
    return found


def count_captions(folder: Path, index: Index) -> int:
    """Captions of all samples."""
    total = index.samples
    with open(folder / CAPTIONS_NAME, "rb") as packed:
        while data := packed.read(1 << 20):
            total += data.count(SEPARATOR.encode())
    return total
