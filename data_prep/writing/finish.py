"""From receipts to table, captions and index: the last step, after which a folder is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.sources.base import Entries
from data_prep.writing import receipt
from data_prep.writing.account import Account
from data_prep.writing.receipt import Receipt, Rejected
from megapix.errors import InputError
from megapix.files import write_atomic
from megapix.shards.index import CAPTIONS_NAME, TABLE_NAME, ClassEntry, Index, ShardEntry, write_index
from megapix.shards.table import SampleRecord

REJECTED_NAME = "rejected.jsonl"


class _Hashed:
    """A file beside its final name, hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.tmp")
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
    parts: int,
    classes: Callable[[int], tuple[str, ...]],
    base: str,
    image_policy: dict[str, Any],
    source: dict[str, Any],
    listed: Entries | None = None,
    filtered: Mapping[str, int] | None = None,
) -> Index:
    """Put the receipts of parts 0 … `parts` - 1 together, and write the index.

    Args:
        classes: the names of the classes, given the largest label; that is -1 where no sample has a class.
        base: where the tar files lie; empty for `out`.
        listed: what the source has listed; None where the receipts have it.
        filtered: option -> samples that it took before the parts were made.

    Raises:
        InputError: not one sample can be used, or some have a class and some have not.
    """
    entries: list[tuple[int, int, int, ShardEntry]] = []
    rejected: list[Rejected] = []
    taken, seen = Counter(filtered or {}), Entries() if listed is None else listed
    for number in range(parts):
        there = _receipt(out, number)
        taken.update(there.filtered)
        if there.listed:
            seen.add(there.listed)
        entries += [(entry.bucket, number, place, entry) for place, entry in enumerate(there.entries)]
        rejected += there.rejected
    entries.sort()
    if not entries:
        raise InputError("not one sample can be used")
    table, captions = _Hashed(out / TABLE_NAME), _Hashed(out / CAPTIONS_NAME)
    counts: Counter[int] = Counter()
    for row, (_, number, place, _) in enumerate(entries):
        for entry, size, offset, label, crc, caption in _receipt(out, number).samples:
            if entry == place:
                text = caption.encode()
                record = SampleRecord(row, size, offset, max(label, 0), crc, captions.size, len(text))
                table.write(record.to_bytes())
                captions.write(text)
                counts[label] += 1
    names = classes(max(counts))
    if -1 in counts and len(counts) > 1:
        raise InputError(f"{counts[-1]} samples have no class (cls), but {counts.total() - counts[-1]} have one")
    counts[0] += counts.pop(-1, 0)
    if max(counts) >= len(names):
        raise InputError(f"a sample has class {max(counts)}, but there are {len(names)} classes, numbered from 0")
    _write_rejected(out, rejected)
    index = Index(
        samples=sum(counts.values()),
        base=base,
        classes=tuple(ClassEntry(name, counts[label]) for label, name in enumerate(names)),
        shards=tuple(entry for *_, entry in entries),
        table_sha256=table.done(),
        captions_sha256=captions.done(),
        image_policy=image_policy,
        source=source,
        rejected=len(rejected),
    )
    account = Account(
        seen.listed,
        index.samples,
        len(rejected),
        dict(sorted(taken.items())),
        seen.parts,
        dict(sorted(seen.passed.items())),
    )
    account.save(out)
    write_index(out, index)
    return index


def _receipt(out: Path, number: int) -> Receipt:
    found = receipt.load(out, number)
    if found is None:
        raise InputError(f"{out}: the receipt of part {number} is gone; run the same command again")
    return found


def _write_rejected(out: Path, rejected: list[Rejected]) -> None:
    path = out / REJECTED_NAME
    if rejected:
        lines = (json.dumps(one.__dict__, ensure_ascii=False) for one in rejected)
        write_atomic(path, ("\n".join(lines) + "\n").encode())
    else:
        path.unlink(missing_ok=True)
