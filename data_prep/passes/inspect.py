"""What is in a shard folder or index: counts, classes, sizes, captions, and a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.passes.caption_counts import CaptionCounts
from data_prep.passes.text_feature_report import text_line
from data_prep.writing import account
from megapix.errors import InputError
from megapix.shards.index import Index, read_index
from megapix.shards.storage import Access, open_storage
from megapix.shards.table import Captions, Table, check_table

BAR = 40
"""Characters of the longest bar of a histogram."""
CELL = 128
"""Pixels of a cell of the contact sheet where images have no common size."""


def report(folder: Path) -> Iterator[str]:
    """Lines of text about the folder.

    Raises:
        InputError: no such folder, or its index or captions cannot be read.
    """
    index = read_index(folder)
    check_table(folder, index)
    policy, total = index.image_policy, int(index.table.file_bytes.sum())
    sizes = np.sort(Table(folder, index).columns["size"])
    size = f"{policy['size']} pixels" if policy["size"] else "any size"
    yield f"{folder}: {index.samples:,} images of {size} in {len(index.files)} shards"
    yield f"  source       {index.source.get('kind')}" + (f", {index.base}" if index.base else "")
    scaled = ", ICC profiles ignored" if policy.get("icc") == "ignore" else ""
    if policy["mode"] != "untouched":
        scaled += ", draft" if policy.get("draft") else ", fast" if policy["fast"] else ", exact"
    yield f"  policy       {policy['mode']}{scaled}, applied at {policy['applied']}"
    yield f"  bytes        {total:,} in shards, {total // index.samples:,} per sample"
    yield f"  image bytes  {sizes[0]:,} smallest, {sizes[len(sizes) // 2]:,} median, {sizes[-1]:,} largest"
    for number, line in enumerate(_captions(folder, index).lines(partial(_shard_of, index))):
        yield f"  {'' if number else 'captions':12} {line}"
    yield from text_line(folder, index)
    yield f"  rejected     {index.rejected:,}" + (" (rejected.jsonl)" if index.rejected else "")
    if counted := account.load(folder):
        yield f"  entries      {counted.listed:,}: {counted}"
        for number, remark in enumerate([*counted.remarks, *counted.noted(policy["size"])]):
            yield f"  {'' if number else 'remarks':12} {remark}"
    yield f"  identity     {index.digest}"
    buckets = [tuple(bucket) for bucket in policy["buckets"]]
    if len(buckets) > 1:
        yield "  buckets (width x height)"
        counts = index.bucket_samples
        yield from _histogram([(f"{w}x{h}", counts.get(b, 0)) for b, (h, w) in enumerate(buckets)])
        for remark in rare_buckets(index):
            yield f"  {remark}"
    yield "  classes"
    yield from _histogram([(entry.name, entry.samples) for entry in index.classes])


def rare_buckets(index: Index) -> Iterator[str]:
    """A line for each aspect bucket that was merged into another one, and one for the rarest that is left."""
    names = [f"{width}x{height}" for height, width in index.image_policy["buckets"]]
    least = index.image_policy.get("bucket_min", 0)
    for bucket, into, samples in index.image_policy.get("merged", []):
        yield f"{samples:,} samples of bucket {names[bucket]} are in {names[into]} (--bucket-min {least})"
    counts = index.bucket_samples
    if len(counts) > 1:
        rarest = min(counts, key=lambda bucket: (counts[bucket], bucket))
        hint = f"--bucket-min {least}" if least else "--bucket-min merges rare ones"
        yield (
            f"the rarest bucket, {names[rarest]}, has {counts[rarest]:,} samples, the most that a run's global "
            f"batch may have ({hint})"
        )


def _histogram(rows: list[tuple[str, int]]) -> Iterator[str]:
    largest, width = max(count for _, count in rows), max(len(name) for name, _ in rows)
    for number, (name, count) in enumerate(rows):
        yield f"  {number:5d} {name:{width}} {count:8,} {'#' * round(BAR * count / largest)}"


def _captions(folder: Path, index: Index) -> CaptionCounts:
    counts, captions = CaptionCounts(), Captions(folder, index)
    for sample in range(index.samples):
        counts.add(sample, captions.of(sample))
    return counts


def _shard_of(index: Index, sample: int) -> str:
    return index.shards[int(np.searchsorted(index.table.first, sample, "right")) - 1].name


def contact_sheet(folder: Path, out: Path, columns: int, rows: int, access: Access) -> int:
    """Write a PNG of the first images of each class, a row for each class (`rows` at most); return the images shown.

    Raises:
        InputError: an image cannot be read or decoded, or the PNG cannot be written.
    """
    from PIL import Image

    from megapix.shards.image_policy import Policy, decode_indexed

    index = read_index(folder)
    policy, storage = Policy.from_dict(index.image_policy), open_storage(index.tars_at(folder), access)
    cell, gap = policy.size or CELL, 2
    rows = min(rows, len(index.classes))
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), (255, 255, 255))
    shown = [0] * rows
    for record in Table(folder, index).rows():
        if record.label >= rows or shown[record.label] >= columns:
            continue
        entry = index.shards[record.shard]
        try:
            data = storage.read(entry.name, record.offset, record.size)
            image = Image.fromarray(decode_indexed(data, policy, entry.bucket, index.prepared))
        except (OSError, ValueError) as error:
            raise InputError(f"{storage.where(entry.name)}: the image at byte {record.offset}: {error}") from error
        image.thumbnail((cell, cell))
        left, top = (gap + place * (cell + gap) for place in (shown[record.label], record.label))
        sheet.paste(image, (left + (cell - image.width) // 2, top + (cell - image.height) // 2))
        shown[record.label] += 1
        if min(shown) == columns:
            break
    try:
        sheet.save(out, "PNG")
    except OSError as error:
        raise InputError(f"--sheet {str(out)!r} cannot be written: {error.strerror or error}") from error
    return sum(shown)
