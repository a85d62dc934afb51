"""What is in a shard folder: counts, classes, sizes, and a contact sheet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megapix.shards import RECORD, TABLE_NAME, Index, SampleRecord, read_index

BAR = 40
"""Characters of the longest bar of the histogram."""


def report(folder: Path) -> Iterator[str]:
    """Lines of text about the folder.

    Raises:
        InputError: no such folder, or its index cannot be read.
    """
    index = read_index(folder)
    sizes = sorted(record.size for record in _records(folder, index))
    total = sum(shard.bytes for shard in index.shards)
    yield f"{folder}: {index.samples:,} images of {index.image_size} pixels in {len(index.shards)} shards"
    yield f"  source       {index.source.get('kind')}"
    yield f"  policy       {index.image_policy.get('policy')}"
    yield f"  bytes        {total:,} in shards, {total // index.samples:,} a sample"
    yield f"  image bytes  {sizes[0]:,} smallest, {sizes[len(sizes) // 2]:,} median, {sizes[-1]:,} largest"
    yield f"  rejected     {index.rejected:,}" + (" (rejected.jsonl)" if index.rejected else "")
    yield f"  identity     {index.digest}"
    largest = max(entry.samples for entry in index.classes)
    width = max(len(entry.name) for entry in index.classes)
    for number, entry in enumerate(index.classes):
        yield f"  {number:5d} {entry.name:{width}} {entry.samples:8,} {'#' * round(BAR * entry.samples / largest)}"


def contact_sheet(folder: Path, out: Path, columns: int, rows: int) -> int:
    """Write a PNG of the first images of each class, a row for each class (`rows` at most); return the images shown."""
    from PIL import Image

    from data_prep.transform import decode

    index = read_index(folder)
    size, gap = index.image_size, 2
    rows = min(rows, len(index.classes))
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap), (255, 255, 255))
    shown = [0] * rows
    for record in _records(folder, index):
        if record.label >= rows or shown[record.label] >= columns:
            continue
        with open(folder / index.shards[record.shard].name, "rb") as file:
            image = decode(os.pread(file.fileno(), record.size, record.offset))
        sheet.paste(image, (gap + shown[record.label] * (size + gap), gap + record.label * (size + gap)))
        shown[record.label] += 1
        if min(shown) == columns:
            break
    sheet.save(out, "PNG")
    return sum(shown)


def _records(folder: Path, index: Index) -> Iterator[SampleRecord]:
    table = (folder / TABLE_NAME).read_bytes()
    return (SampleRecord(*fields) for fields in RECORD.iter_unpack(table[: index.samples * RECORD.size]))
