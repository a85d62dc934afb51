"""Is a shard folder, or an index over tar files elsewhere, what its index says? Reads everything; changes nothing."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.listing import img2dataset
from data_prep.listing.base import Entries
from data_prep.listing.captions import trimmed
from data_prep.listing.classes import from_record, numbered
from data_prep.listing.reading import Reading, as_indexed
from data_prep.listing.tar_samples import TarSample, samples_of
from data_prep.listing.tars import members
from data_prep.parts.folder import Parts
from data_prep.parts.part import WHOLE, Part
from data_prep.passes.merge import part_of
from data_prep.passes.text_feature_report import text_faults
from data_prep.writing.index import INDEX_KIND, local_copy, rows_beside
from data_prep.writing.pool import check_workers, in_processes
from megapix.errors import InputError
from megapix.files import sha256_of, write_atomic
from megapix.shards.captions import unpack
from megapix.shards.image_policy import Policy, decode_indexed
from megapix.shards.index import CAPTIONS_NAME, TABLE_NAME, Index, ShardEntry, read_index
from megapix.shards.storage import Access, Local, open_storage
from megapix.shards.table import SampleRecord, Table, check_table

Rows = tuple[ShardEntry, int, int]
"""An entry, its place in the index's list, and the number of its first sample."""


def verify(folder: Path, workers: int, access: Access, progress: bool = True, part: Part = WHOLE) -> Iterator[str]:
    """Yield every fault found: sizes, hashes and members of shards, records, classes, captions, decoding.

    Args:
        part: the share of the tar files and features that is read; what is of the whole index is of the first.

    Raises:
        InputError: the index itself cannot be read, or a remote shard cannot be reached.
    """
    from tqdm import tqdm

    check_workers(workers)
    index = read_index(folder)
    try:
        check_table(folder, index)
    except InputError as error:
        yield from [str(error)] if not part.number else ()
        return
    Policy.from_dict(index.image_policy)
    files: dict[str, list[Rows]] = {}
    first = 0
    for place, entry in enumerate(index.shards):
        files.setdefault(entry.name, []).append((entry, place, first))
        first += entry.samples
    if not part.number:
        yield from _class_faults(folder, index)
    jobs = list(part.mine(files.values()))
    total = sum(entry.samples for rows in jobs for entry, _, _ in rows)
    with tqdm(total=total, unit="img", disable=not progress, mininterval=0.5) as bar:
        for rows, faults in in_processes(partial(_verify_file, folder, index, access), jobs, workers):
            bar.update(sum(entry.samples for entry, _, _ in rows))
            yield from faults
    yield from text_faults(folder, index, progress, part)


def close(parts: Parts) -> list[str]:
    """Write the faults that all parts have found; return them."""
    faults = [fault for counted in parts.counts() for fault in counted["faults"]]
    return write_report(parts.out, faults)


def write_report(out: Path, faults: list[str]) -> list[str]:
    """Write faults to a file, a line each, in the order of their letters; return them so."""
    write_atomic(out, "".join(f"{fault}\n" for fault in sorted(faults)).encode("utf-8", "backslashreplace"))
    return sorted(faults)


def _class_faults(folder: Path, index: Index) -> Iterator[str]:
    counts = Counter(record.label for record in Table(folder, index).rows())
    for label, listed in enumerate(index.classes):
        if counts.pop(label, 0) != listed.samples:
            yield f"class {listed.name!r} has another number of samples than the {listed.samples} that the index lists"
    if counts:
        yield f"{TABLE_NAME} has samples of class {min(counts)}, but there are {len(index.classes)} classes"


def _verify_file(folder: Path, index: Index, access: Access, rows: list[Rows]) -> list[str]:
    storage, name = open_storage(index.tars_at(folder), access), rows[0][0].name
    if isinstance(storage, Local) and not (storage.base / name).is_file():
        return [f"{storage.where(name)} is missing, but the index lists it"]
    reading = as_indexed(_source_of(index, name))
    with (
        tempfile.TemporaryDirectory() as temporary,
        local_copy(storage, name, Path(temporary)) as path,
        rows_beside(storage, name, Path(temporary), reading) as beside,
    ):
        return list(_faults(folder, index, storage.where(name), path, rows, reading, beside))


def _faults(
    folder: Path, index: Index, shown: str, path: Path, rows: list[Rows], reading: Reading, beside: img2dataset.Rows
) -> Iterator[str]:
    entry = rows[0][0]
    if (size := path.stat().st_size) != entry.bytes:
        yield f"{shown} has {size} bytes, but the index lists {entry.bytes}"
        return
    if sha256_of(path) != entry.sha256:
        yield f"{shown}: sha256 differs from the index: the file was changed or damaged"
        return
    try:
        samples = samples_of(path, Entries(), reading, beside, shown)
        by_offset: dict[int, list[tuple[TarSample, int]]] = {}
        for sample, label in zip(samples, _labels_of(samples, index, entry.name), strict=True):
            by_offset.setdefault(sample.offset, []).append((sample, label))
    except InputError as error:
        yield str(error)
        return
    if not index.base:
        listed = sum(entry.samples for entry, _, _ in rows)
        if len(samples) != listed:
            yield f"{shown}: holds {len(samples)} samples, the index lists {listed}"
        if not _in_order(path, samples):
            yield f"{shown}: the members are not KEY.cls, KEY.json and the image of each sample, in order"
    policy, table = Policy.from_dict(index.image_policy), Table(folder, index)
    with open(path, "rb") as file, open(folder / CAPTIONS_NAME, "rb") as captions:
        for entry, place, first in rows:
            for record in table.rows(first, first + entry.samples):
                there = by_offset.get(record.offset, [])
                if not there or (record.shard, record.size) != (place, there[0][0].size):
                    yield f"{shown}: a record of {TABLE_NAME} points at byte {record.offset}, where no image begins"
                    continue
                data = os.pread(file.fileno(), record.size, record.offset)
                caption = os.pread(captions.fileno(), record.caption_size, record.caption_offset)
                found = [(one, list(_sample_faults(record, one, label, data, caption))) for one, label in there]
                sample, faults = min(found, key=lambda each: len(each[1]))  # links: samples may share an image
                yield from (f"{shown}: sample {sample.key}: {fault}" for fault in faults)
                try:
                    decode_indexed(data, policy, entry.bucket, index.prepared)
                except ValueError as error:
                    yield f"{shown}: sample {sample.key}: cannot be decoded: {error}"


def _source_of(index: Index, name: str) -> dict[str, Any]:
    """What is recorded of how a tar file was read. Nothing of shards that `write` made: they have our own keys and
    class numbers, wherever their captions and labels came from."""
    source = part_of(index, name).get("source", index.source)
    return source if source.get("kind") == INDEX_KIND else {}


def _labels_of(samples: list[TarSample], index: Index, name: str) -> list[int]:
    """The samples' class numbers: those of the part that the tar file comes from, as they are in this index."""
    numbers = part_of(index, name).get("labels", range(len(index.classes)))
    classes = index.class_names
    names = [classes[number] for number in numbers]
    labels = numbered([sample.label for sample in samples], from_record(names, _source_of(index, name)))
    return [numbers[label] if label < len(numbers) else label for label, _ in labels]


def _sample_faults(record: SampleRecord, sample: TarSample, label: int, data: bytes, caption: bytes) -> Iterator[str]:
    if zlib.crc32(data) != record.crc:
        yield "its bytes are not those that were indexed"
    if sample.fault:
        yield sample.fault
        return
    if label != record.label:
        yield f"the class differs from {TABLE_NAME}"
    try:
        indexed, fault = trimmed(unpack(caption.decode())), ""  # older indexes have the blanks around a caption
    except ValueError as error:
        indexed, fault = None, f"its captions in {CAPTIONS_NAME} cannot be told apart: {error}"
    if indexed != sample.caption:
        yield f"the caption differs from {CAPTIONS_NAME}"
    if fault:
        yield fault


def _in_order(path: Path, samples: list[TarSample]) -> bool:
    expected = [n for s in samples for n in sorted((f"{s.key}.cls", f"{s.key}.json", s.name))]
    keys = [sample.key for sample in samples]
    return [name for name, _, _ in members(path, Entries())] == expected and keys == sorted(keys)
