"""One index over folders that were prepared apart, without rewriting a byte of their tar files: `data_prep merge`.

Classes are joined by their names, in the order in which they appear. The parts stay as they are and where they are; the
index finds their tar files from a folder that is common to all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.listing.tar_set import recorded_base
from data_prep.writing import account, versions
from data_prep.writing import plan as planning
from data_prep.writing.account import ACCOUNT_NAME, Account
from data_prep.writing.finish import REJECTED_NAME, HashedFile
from data_prep.writing.pool import alone_in
from data_prep.writing.write import begin
from megapix.errors import InputError
from megapix.files import write_atomic
from megapix.shards.index import (
    CAPTIONS_NAME,
    TABLE_NAME,
    ClassEntry,
    Index,
    ShardEntry,
    missing_shards,
    read_index,
    write_index,
)
from megapix.shards.mix import alike
from megapix.shards.storage import is_url
from megapix.shards.table import Table, check_table

KIND = "merged"


@dataclass(frozen=True)
class Part:
    """A prepared folder that is joined with others."""

    folder: Path
    index: Index
    tars: str
    """Absolute path of the folder of its tar files."""


def merge(folders: Sequence[Path], out: Path) -> tuple[Index, bool]:
    """Join prepared folders into an index in `out`; return it, and whether it was finished already.

    Raises:
        InputError: fewer than two, one that is not whole, remote tar files, other image policies or classes that cannot
            be told apart by name, a tar file that is in two of them, or an `out` of something else.
    """
    if len(folders) < 2:
        raise InputError(f"merge joins folders, but there is {len(folders)}; expected PART PART… --out INDEX")
    parts = [_part(folder) for folder in folders]
    first, *others = parts
    for other in others:
        shown = str(first.folder), str(other.folder)
        alike.check_policies(first.index, other.index, *shown)
        alike.check_classes(first.index.class_names, other.index.class_names, *shown)
    _check_different(parts)
    _check_apart(parts)
    if any(os.path.realpath(part.folder) == os.path.realpath(out) for part in parts):
        raise InputError(f"--out {str(out)!r} is one of the parts; give a folder of its own")
    common = os.path.commonpath([part.tars for part in parts])
    base = recorded_base(common, out, planning.begun(out).get("base", ""))
    plan = {"kind": KIND, "base": base, "parts": [part.index.digest for part in parts]}
    try:
        planning.settle(out, plan, free=("base", "parts"))
        with alone_in(out):
            planning.record(out, plan)
            there = begin(out, retry_rejected=False)
            if there and there.base == base and there.source["of"] == plan["parts"]:
                return there, True
            versions.replaced({out: there} if there else {}, partial(_join, parts, out, common, base))
            return read_index(out), False
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error


def part_of(index: Index, name: str) -> dict[str, Any]:
    """What a merged index says of the part that a tar file comes from: its "source", and "labels", the numbers that its
    classes have here; an empty one for any other index."""
    parts = index.source["parts"] if index.source.get("kind") == KIND else []
    found = [one for one in parts if one["folder"] == "." or name.startswith(f"{one['folder']}/")]
    return max(found, key=lambda one: len(one["folder"]), default={})


def _part(folder: Path) -> Part:
    index = read_index(folder)
    check_table(folder, index)
    tars = index.tars_at(os.path.abspath(folder))
    if is_url(tars):
        raise InputError(f"{folder}: its tar files lie at {tars}; merge joins local ones")
    if faults := missing_shards(Path(tars), index):
        raise InputError(faults[0])
    return Part(folder, index, tars)


def _check_different(parts: list[Part]) -> None:
    seen: dict[str, str] = {}
    for part in parts:
        for entry in part.index.files:
            path = os.path.join(part.tars, entry.name)
            if there := seen.get(entry.sha256):
                raise InputError(f"{path} and {there} are the same tar file; give each part once")
            seen[entry.sha256] = path


def _check_apart(parts: list[Part]) -> None:
    """The nearest folder says of which part a tar file is (`part_of`)."""
    for part in parts:
        for other in parts:
            inside = f"{os.path.relpath(other.tars, part.tars)}/"
            if other is not part and any(entry.name.startswith(inside) or inside == "./" for entry in part.index.files):
                raise InputError(
                    f"tar files of {str(part.folder)!r} and {str(other.folder)!r} lie in one folder, {other.tars}; "
                    "expected one for each"
                )


def _join(parts: list[Part], out: Path, common: str, base: str) -> Index:
    names, labels = alike.joined([part.index.class_names for part in parts])
    about = [one for part, numbers in zip(parts, labels, strict=True) for one in _about(part, numbers, common)]
    table, captions = HashedFile(out / TABLE_NAME), HashedFile(out / CAPTIONS_NAME)
    shards: list[ShardEntry] = []
    counts = np.zeros(len(names), np.int64)
    for bucket in sorted({bucket for part in parts for bucket in part.index.bucket_samples}):
        for part, numbers in zip(parts, labels, strict=True):
            for entry, records, text in _entries_of(part, bucket):
                records["shard"], records["label"] = len(shards), np.array(numbers)[records["label"]]
                records["caption_offset"] += np.uint64(captions.size)
                table.write(records.tobytes())
                captions.write(text)
                counts += np.bincount(records["label"], minlength=len(names))
                name = os.path.relpath(os.path.join(part.tars, entry.name), common)
                shards.append(ShardEntry(name, entry.samples, entry.bytes, entry.sha256, entry.bucket))
    _write_rejected(parts, out)
    index = Index(
        samples=int(counts.sum()),
        base=base,
        classes=tuple(ClassEntry(name, int(count)) for name, count in zip(names, counts, strict=True)),
        shards=tuple(shards),
        table_sha256=table.done(),
        captions_sha256=captions.done(),
        image_policy=_policy(parts),
        source={"kind": KIND, "of": [part.index.digest for part in parts], "parts": about},
        rejected=sum(part.index.rejected for part in parts),
    )
    _write_account(parts, out)
    write_index(out, index)
    return index


def _about(part: Part, numbers: list[int], common: str) -> list[dict[str, Any]]:
    """What is recorded of a part, or of those that it was merged from: the folder of its tar files, the numbers that
    its classes have now, and where its images came from."""
    source = part.index.source
    before = source["parts"] if source.get("kind") == KIND else []
    whole = {"folder": ".", "labels": range(len(numbers)), "source": source}
    return [
        {
            "folder": os.path.relpath(os.path.join(part.tars, one["folder"]), common),
            "labels": [numbers[label] for label in one["labels"]],
            "source": one["source"],
        }
        for one in before or [whole]
    ]


def _entries_of(part: Part, bucket: int) -> Any:
    """(entry, a copy of its records, their captions) of each entry of a bucket; caption offsets count from 0."""
    columns, first = Table(part.folder, part.index).columns, 0
    with open(part.folder / CAPTIONS_NAME, "rb") as file:
        for entry in part.index.shards:
            records = columns[first : first + entry.samples]
            first += entry.samples
            if entry.bucket != bucket:
                continue
            records = records.copy()
            sizes = records["caption_size"].astype(np.uint64)
            start = records["caption_offset"][0]
            records["caption_offset"] -= start
            if (records["caption_offset"] != np.cumsum(sizes) - sizes).any():
                raise InputError(f"{part.folder / TABLE_NAME}: its captions are not in the order of its samples")
            file.seek(int(start))
            yield entry, records, file.read(int(sizes.sum()))


def _policy(parts: list[Part]) -> dict[str, Any]:
    """That of the parts, without what they may have in different ways."""
    policies = [part.index.image_policy for part in parts]
    first, *others = policies
    same = {k: v for k, v in first.items() if k not in alike.UNITED and all(other.get(k) == v for other in others)}
    if least := max(policy.get("bucket_min", 0) for policy in policies):
        moved = Counter[tuple[int, int]]()
        for policy in policies:
            moved.update({(bucket, into): samples for bucket, into, samples in policy.get("merged", [])})
        merged = [[bucket, into, samples] for (bucket, into), samples in sorted(moved.items())]
        same |= {"bucket_min": least, "merged": merged}
    return same


def _write_rejected(parts: list[Part], out: Path) -> None:
    paths = [part.folder / REJECTED_NAME for part in parts]
    if lines := b"".join(path.read_bytes() for path in paths if path.is_file()):
        write_atomic(out / REJECTED_NAME, lines)
    else:
        (out / REJECTED_NAME).unlink(missing_ok=True)


def _write_account(parts: list[Part], out: Path) -> None:
    """The sum of the parts' accounts, where each has one."""
    accounts = [asdict(found) for part in parts if (found := account.load(part.folder))]
    if len(accounts) < len(parts):
        (out / ACCOUNT_NAME).unlink(missing_ok=True)
        return
    total: dict[str, Any] = {}
    for key in (field.name for field in fields(Account)):
        values = [one[key] for one in accounts]
        total[key] = _summed(values)
    Account(**total).save(out)


def _summed(values: list[Any]) -> Any:
    """The sum of numbers or counts; of remarks, each once."""
    if isinstance(values[0], int):
        return sum(values)
    if isinstance(values[0], list):
        return list(dict.fromkeys(line for lines in values for line in lines))
    total = Counter[str]()
    for one in values:
        total.update(one)
    return dict(sorted(total.items()))
