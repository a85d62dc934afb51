"""What filters would take, counted without writing anything: from headers, and from pixels where duplicates count."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_prep.filters.chosen import by_metadata, by_pixels
from data_prep.filters.rules import Filters, check_columns
from data_prep.filters.survey import UNREADABLE, look, record_of, resolved
from data_prep.listing.archives import DamagedTar
from data_prep.listing.base import Entries, Source
from data_prep.listing.img2dataset import Rows, beside
from data_prep.listing.reading import Reading
from data_prep.listing.tar_samples import samples_of
from data_prep.listing.tar_set import tars_of_split
from data_prep.writing.held_out import OneSide
from data_prep.writing.plan import Options
from data_prep.writing.pool import in_processes
from megapix.errors import InputError
from megapix.shards.image_policy import Policy
from megapix.shards.storage import Access, is_url


@dataclass
class Counted:
    """The samples of a source."""

    samples: int
    left: int = 0
    """Those that no filter takes and that can be read, as far as their headers say."""
    unreadable: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    tars: dict[str, str] = field(default_factory=dict)
    """Tar file that cannot be read -> the reason; each counts as one sample."""

    def table(self, options: Sequence[str]) -> Iterator[str]:
        """Lines: a filter each, in the order in which they are asked, and what is left."""
        rows = [("samples", self.samples), *((option, self.taken[option]) for option in options)]
        rows += [("cannot be read", self.unreadable), ("left", self.left)]
        width = max(len(name) for name, _ in rows)
        yield from (f"  {name:{width}} {count:10,}" for name, count in rows)


def of_source(source: Source, options: Options, workers: int) -> Counted:
    """What would become of the samples of a source.

    Raises:
        InputError: a column that not one sample has.
    """
    filters = options.filters
    left, taken = by_metadata(source.items, filters, options.keep)
    if filters.sizes or filters.duplicates:
        looked, side = (left, None) if not isinstance(source, OneSide) else (source.source.items, source.side)
        if side:
            looked, _ = by_metadata(looked, filters, options.keep)
        left, others, unreadable = by_pixels(source.reader, looked, filters, options.policy, workers, side=side)
        taken += others
    else:
        unreadable = sum(bool(item.fault) for item in left)
    return Counted(len(source.items), len(left) - unreadable, unreadable, taken)


def of_shards(
    pattern: str, policy: Policy, reading: Reading, filters: Filters, workers: int, access: Access
) -> Counted:
    """What would become of the samples of local tar files.

    Raises:
        InputError: remote tar files, one that is not there, or a column that not one sample has.
    """
    if is_url(pattern):
        raise InputError(f"--dry-run reads local tar files, and {pattern!r} is remote: index some of them, or all")
    base, names, _ = tars_of_split(pattern, access, reading, Entries())
    found = dict(in_processes(partial(_of_tar, base, policy, reading, filters), names, workers))
    ordered = [found[name] for name in names]
    check_columns(filters.named(), {column for each in ordered for column in each.columns})
    taken: Counter[str] = sum((each.taken for each in ordered), Counter())
    verdicts = resolved(b"".join(each.records for each in ordered), filters)
    samples = len(verdicts) + sum(taken.values())
    for number, option in enumerate(filters.options, 1):
        taken[option] += int((verdicts == number).sum())
    unreadable = int((verdicts == UNREADABLE).sum())
    tars = {name: found[name].fault for name in names if found[name].fault}
    return Counted(samples, int((verdicts == 0).sum()), unreadable, taken, tars)


class _Tar(NamedTuple):
    """What is counted of one tar file."""

    taken: Counter[str]
    """Filter of captions or metadata -> samples that it takes."""
    records: bytes
    """Of the other samples."""
    columns: set[str]
    """Those that there are."""
    fault: str = ""
    """Why the tar file as a whole cannot be read; it has one record then."""


def _of_tar(base: str, policy: Policy, reading: Reading, filters: Filters, name: str) -> _Tar:
    taken, records, columns = Counter[str](), list[bytes](), set[str]()
    path = Path(base) / name
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        listed = samples_of(path, Entries(), reading, Rows(partial(beside, path), reading))
    except DamagedTar as error:
        return _Tar(taken, record_of(UNREADABLE, b"", filters), columns, str(error))
    with open(path, "rb") as file:
        for sample in listed:
            columns.update(json.loads(sample.about or "{}"))
            if sample.fault:
                records.append(record_of(UNREADABLE, b"", filters))
            elif option := filters.of_sample(sample.caption, sample.about):
                taken[option] += 1
            else:
                data = os.pread(file.fileno(), sample.size, sample.offset)
                records.append(record_of(*look(data, filters, policy), filters))
    return _Tar(taken, b"".join(records), columns)
