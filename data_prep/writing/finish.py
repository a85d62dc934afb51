"""From receipts to table, captions and index: the last step, after which a folder is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep.filters.duplicates import duplicates_of
from data_prep.filters.fingerprints import length_of
from data_prep.filters.rules import Duplicates
from data_prep.listing.base import Entries
from data_prep.listing.captions import lacking
from data_prep.listing.classes import Classes, Found, Given, Label, NoClass, numbered, recorded
from data_prep.writing import receipt
from data_prep.writing.account import Account
from data_prep.writing.held_out import HoldOut, Side, folder_beside
from data_prep.writing.pool import Budget
from data_prep.writing.receipt import CHECKS, Part, Receipt, Rejected, Sample
from data_prep.writing.survey import Rare
from megapix.errors import InputError
from megapix.files import temporary_of, write_atomic
from megapix.shards.index import CAPTIONS_NAME, TABLE_NAME, ClassEntry, Index, ShardEntry, write_index
from megapix.shards.table import DTYPE, PART, SampleRecord

REJECTED_NAME = "rejected.jsonl"


class HashedFile:
    """A file beside its final name, hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, temporary_of(path)
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115  # closed by `done`
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += len(data)

    def done(self) -> str:
        """Sync it, give it its name, and return its SHA-256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        return self.digest.hexdigest()


def finish(
    out: Path,
    parts: Sequence[Part],
    classes: Callable[[Found], Classes | Given],
    base: str,
    image_policy: dict[str, Any],
    source: dict[str, Any],
    listed: Entries | None = None,
    filtered: Mapping[str, int] | None = None,
    budget: Budget | None = None,
    hold: HoldOut | None = None,
    captioned: bool = False,
    merge: Callable[[Counter[int]], Rare] | None = None,
    duplicates: Duplicates | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Index:
    """Put the receipts of the parts together, in their order, and write the index; with `hold` also that of the folder
    of what is held out, before the other.

    Args:
        classes: the classes, given the labels of all samples.
        base: where the tar files lie; empty for `out`.
        listed: what the source has listed, besides what receipts say.
        filtered: option -> samples that it took before the parts were made.
        budget: of samples that are rejected here, for their labels.
        captioned: whether captions are what is wanted, even if no sample has one.
        merge: the buckets that are merged into others, given the samples of each; None where the parts know already.
        duplicates: which samples of all parts are the same, where their fingerprints are in the receipts.
        say: is called with each line that the command prints.

    Raises:
        InputError: not one sample can be used, more are rejected than the budget allows, or `hold` leaves a folder
            empty.
    """
    found, taken, seen, notes = Found(), Counter(filtered or {}), Entries(), Counter[str]()
    unchecked = Counter[str]()
    found.captioned = captioned
    seen.add(listed or Entries())
    gone = _duplicates(out, parts, duplicates) if duplicates else {}
    for part in parts:
        there = _receipt(out, part, gone, duplicates)
        taken.update(there.filtered)
        notes.update(there.notes)
        unchecked[there.check] += there.check != CHECKS[-1]
        if there.listed:
            seen.add(there.listed)
        for label, count in Counter(_labels(there)).items():
            found.add(label, count)
        found.captioned = found.captioned or any(sample.caption for sample in there.samples)
    settled = classes(found)
    what = _What(out, parts, settled, gone, duplicates)
    if budget and found.refused_by(settled):
        budget.spend(tuple(one for each in what.all() for one in each.rejected_here))
    seen.remark(settled.remark)
    for check, count in sorted((+unchecked).items()):
        seen.remark(
            f"the images of {count:,} tar files were not decoded (--check {check}): damaged ones may be among them"
        )
    for line in seen.remarks:
        say(line)
    source = source | recorded(settled)
    rare = merge(what.by_bucket()) if merge else Rare()
    whole = _Whole(what, rare, base, image_policy | rare.recorded(), seen)
    if hold is None:
        return _finish(out, whole, None, source, taken, notes)
    for side in hold.sides(name for each in what.all() for name in each.usable()):
        folder = folder_beside(out) if side.held else out
        about = source | hold.recorded() | side.recorded
        counted = (Counter[str](), Counter[str]()) if side.held else (taken, notes)
        index = _finish(folder, whole, side, about, *counted)
    return index


class _Settled(NamedTuple):
    """A receipt whose labels are class numbers."""

    there: Receipt
    numbers: list[int]
    """-1 for a sample that is rejected for its label."""
    rejected_here: list[Rejected]
    """For their labels."""

    def usable(self) -> Iterator[str]:
        """Names of the samples that have a class."""
        return (self.there.name_of(n) for n, number in enumerate(self.numbers) if number >= 0)

    def chosen(self, side: Side | None) -> list[int]:
        """As `numbers`, with -1 for what belongs to the other folder, too."""
        if side is None:
            return self.numbers
        return [
            number if number >= 0 and side.has(self.there.name_of(n)) else -1 for n, number in enumerate(self.numbers)
        ]

    def counts(self, labels: Sequence[int]) -> Counter[int]:
        """Place in the receipt's entries -> samples that have a label, and not -1."""
        return Counter(sample.entry for sample, label in zip(self.there.samples, labels, strict=True) if label >= 0)

    def rejected(self, side: Side | None) -> list[Rejected]:
        """All that are rejected, and belong to the folder."""
        return [one for one in (*self.there.rejected, *self.rejected_here) if side is None or side.has(one.source)]


class _What(NamedTuple):
    """The receipts, and the classes of their labels."""

    out: Path
    parts: Sequence[Part]
    classes: Classes | Given
    gone: Mapping[Part, set[int]]
    """Part -> places of the samples that are duplicates of others."""
    duplicates: Duplicates | None

    def all(self) -> Iterator[_Settled]:
        """The receipts, one at a time."""
        return map(self._of, self.parts)

    def _of(self, part: Part) -> _Settled:
        there = _receipt(self.out, part, self.gone, self.duplicates)
        labels = _labels(there)
        known = dict(zip(distinct := list(set(labels)), numbered(distinct, self.classes), strict=True))
        found = [known[label] for label in labels]
        rejected = [Rejected.because(there.name_of(n), ValueError(why)) for n, (_, why) in enumerate(found) if why]
        return _Settled(there, [-1 if why else label for label, why in found], rejected)

    def by_bucket(self) -> Counter[int]:
        """Bucket -> its samples, before any is merged into another."""
        counts: Counter[int] = Counter()
        for settled in self.all():
            for place, samples in settled.counts(settled.numbers).items():
                counts[settled.there.entries[place].bucket] += samples
        return counts


class _Rows(ExitStack):
    """The rows of table and captions. They come by receipt and are written by bucket: until all are there, those of a
    bucket lie in two files without a name."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        """Class number -> samples."""
        self.uncaptioned = 0
        self._out = out
        self._buckets: dict[int, _Bucket] = {}

    def add(self, settled: _Settled, labels: Sequence[int], rare: Rare) -> None:
        """Add the samples of a receipt whose label is not -1."""
        there, counts = settled.there, settled.counts(labels)
        into = [rare.into.get(entry.bucket, entry.bucket) for entry in there.entries]
        own: dict[int, ShardEntry] = {}
        for place, bucket in enumerate(into):
            if counts[place]:
                first = own.get(bucket, replace(there.entries[place], samples=0, bucket=bucket))
                own[bucket] = replace(first, samples=first.samples + counts[place])
        for bucket, entry in own.items():
            if bucket not in self._buckets:
                records, captions = (self.enter_context(TemporaryFile(dir=self._out)) for _ in range(2))  # noqa: SIM115
                self._buckets[bucket] = _Bucket([], records, captions)
            self._buckets[bucket].entries.append(entry)
        for sample, label in zip(there.samples, labels, strict=True):
            if label >= 0:
                self._buckets[into[sample.entry]].add(sample, label)
                self.uncaptioned += not sample.caption
                self.counts[label] += 1

    def write(self, table: HashedFile, captions: HashedFile) -> tuple[ShardEntry, ...]:
        """Write all rows, in the order of the buckets; returns their entries."""
        entries: list[ShardEntry] = []
        for _, bucket in sorted(self._buckets.items()):
            bucket.write(table, captions, len(entries))
            entries += bucket.entries
        return tuple(entries)


@dataclass
class _Bucket:
    """The rows of one bucket, as if no others were before them."""

    entries: list[ShardEntry]
    records: BinaryIO
    captions: BinaryIO
    size: int = 0
    """Bytes of captions."""

    def add(self, sample: Sample, label: int) -> None:
        """Add a sample of the entry that is the last."""
        text, row = sample.caption.encode(), len(self.entries) - 1
        record = SampleRecord(row, sample.size, sample.offset, label, sample.crc, self.size, len(text))
        self.records.write(record.to_bytes())
        self.captions.write(text)
        self.size += len(text)

    def write(self, table: HashedFile, captions: HashedFile, entries: int) -> None:
        """Write the rows after those of so many entries."""
        before = captions.size
        self.records.seek(0)
        while data := self.records.read(PART * DTYPE.itemsize):
            records = np.frombuffer(data, DTYPE).copy()
            records["shard"] += entries
            records["caption_offset"] += before
            table.write(records.tobytes())
        self.captions.seek(0)
        while data := self.captions.read(1 << 20):
            captions.write(data)


class _Whole(NamedTuple):
    """What both folders of a set in two have in common."""

    what: _What
    rare: Rare
    base: str
    image_policy: dict[str, Any]
    seen: Entries


def _labels(there: Receipt) -> list[Label]:
    """The samples' labels as they are in the tar file."""
    wrong = dict(there.no_class)
    return [NoClass(wrong.get(n, "")) if s.label == -1 else s.label for n, s in enumerate(there.samples)]


def _finish(
    out: Path, whole: _Whole, side: Side | None, source: dict[str, Any], taken: Counter[str], notes: Counter[str]
) -> Index:
    """Write table, captions and index of what belongs to `side`; all without."""
    what, seen = whole.what, whole.seen
    rejected: list[Rejected] = []
    tars = 0
    with _Rows(out) as rows:
        for settled in what.all():
            rows.add(settled, settled.chosen(side), whole.rare)
            rejected += (here := settled.rejected(side))
            tars += settled.there.unreadable and bool(here)
        rejected += [Rejected.because(name, InputError(reason)) for name, reason in seen.unreadable.items()]
        if tars := tars + len(seen.unreadable):
            source = source | {"rejected_tars": tars}
        if not rows.counts:
            why = f": {rejected[-1].source!r}: {rejected[-1].reason}" if rejected else ""
            took = "".join(f"; {option} takes {count:,}" for option, count in taken.items())
            raise InputError(f"not one sample can be used{why}{took}")
        table, captions = HashedFile(out / TABLE_NAME), HashedFile(out / CAPTIONS_NAME)
        entries = rows.write(table, captions)
    counts = rows.counts
    names = what.classes.names
    if max(counts) >= len(names):
        raise InputError(f"a sample has class {max(counts)}, but there are {len(names)} classes, numbered from 0")
    _write_rejected(out, rejected)
    index = Index(
        samples=sum(counts.values()),
        base=whole.base,
        classes=tuple(ClassEntry(name, counts[label]) for label, name in enumerate(names)),
        shards=entries,
        table_sha256=table.done(),
        captions_sha256=captions.done(),
        image_policy=whole.image_policy,
        source=source,
        rejected=len(rejected),
    )
    passed = dict(seen.passed)
    if side:
        others = seen.listed - seen.parts - sum(passed.values()) - index.samples - len(rejected) - taken.total()
        passed[side.others] = others
    account = Account(
        seen.listed,
        index.samples,
        len(rejected),
        dict(sorted(taken.items())),
        seen.parts,
        dict(sorted(passed.items())),
        seen.remarks + lacking(rows.uncaptioned, index.samples, seen.captioned),
        dict(sorted(notes.items())),
    )
    account.save(out)
    write_index(out, index)
    return index


def _receipt(
    out: Path, part: Part, gone: Mapping[Part, set[int]] = MappingProxyType({}), kind: Duplicates | None = None
) -> Receipt:
    found = receipt.load(out, part)
    if found is None:
        raise InputError(f"{out}: the receipt of part {part} is gone; run the same command again")
    return found.without(gone[part], kind.option) if kind and part in gone else found


def _duplicates(out: Path, parts: Sequence[Part], kind: Duplicates) -> dict[Part, set[int]]:
    """Part -> places of the samples that are duplicates of earlier ones, in the order of the parts."""
    prints, counts = bytearray(), []
    for part in parts:
        there = _receipt(out, part).prints
        prints += bytes.fromhex("".join(there))
        counts.append(len(there))
    taken = duplicates_of(np.frombuffer(prints, np.uint8).reshape(-1, length_of(kind)), kind)
    gone: dict[Part, set[int]] = {}
    for part, places in zip(parts, np.split(taken, np.cumsum(counts)[:-1]), strict=True):
        if places.any():
            gone[part] = set(np.flatnonzero(places).tolist())
    return gone


def _write_rejected(out: Path, rejected: list[Rejected]) -> None:
    path = out / REJECTED_NAME
    if rejected:
        lines = (json.dumps(one.__dict__, ensure_ascii=False) for one in rejected)
        write_atomic(path, ("\n".join(lines) + "\n").encode())
    else:
        path.unlink(missing_ok=True)
