"""Shards from a source: plan, write in worker processes, then table and index.

Everything written is a function of the source's list and the options, so any number of workers, and any number of
interruptions, ends in the same bytes. A finished shard is checked by size and hash and not written again; the index
comes last, so a folder with an index is complete.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.filters.chosen import by_metadata, by_pixels
from data_prep.listing.archives import UNPACKED
from data_prep.listing.base import Entries, Source, as_utf8
from data_prep.listing.classes import Classes
from data_prep.parts.folder import Parts, join
from data_prep.parts.part import WHOLE, Part, clear_own
from data_prep.writing import plan as planning
from data_prep.writing.finish import finish
from data_prep.writing.held_out import OneSide
from data_prep.writing.plan import Options
from data_prep.writing.pool import Budget, alone_in, check_workers, in_processes, load_in_workers
from data_prep.writing.receipt import RECEIPTS, Rejected
from data_prep.writing.shard import write_shard
from data_prep.writing.survey import Rare, buckets_of
from megapix.errors import InputError
from megapix.shards.index import INDEX_NAME, Index, missing_shards, read_index
from megapix.shards.mix import alike
from megapix.shards.table import check_table

ACROSS = "dedupe_in"
"""Key of the plan that says where duplicates are looked for, if that is not the folder alone."""
WHOLE_NAME = "whole.json"
"""What all parts know of the whole, beside the receipts."""


def write(
    source: Source,
    out: Path,
    options: Options,
    workers: int,
    max_rejected: float = 0.0,
    retry_rejected: bool = False,
    progress: bool = True,
    of: int = 0,
    part: Part = WHOLE,
    rehash: bool = False,
) -> tuple[Index, bool]:
    """Write `source` into the folder `out`, or resume it; return the index, and whether it was finished already.

    Args:
        workers: processes.
        max_rejected: largest share of samples that may be left out because they cannot be used.
        retry_rejected: write shards with rejected samples again.
        of: samples that the share is of; 0 for those of `source`, which may be a part of a set alone.
        part: the share of the shards that this process writes.
        rehash: compare the hash of every shard that is there, whatever its size and time of modification say.

    Raises:
        PartDone: this part is written, and others are not.
        InputError: an option out of range, a column that no sample has, a folder of something else or of another plan,
            more rejected samples than allowed, or a file that cannot be written; what is finished stays.
    """
    from tqdm import tqdm

    load_in_workers("data_prep.writing.shard", "webdataset")
    options.check()
    options = replace(
        options,
        policy=planning.as_begun(out, options.policy),
        filters=options.filters.with_least_side(options.policy.min_side),
    )
    budget = Budget(max_rejected, of or len(source.items))
    check_workers(workers)
    _check_faults(source, max_rejected)
    plan = planning.describe(source, options)
    both = source if isinstance(source, OneSide) and options.filters.duplicates else None
    if both and (ACROSS in (begun := planning.begun(out)) or not begun):
        plan[ACROSS] = "both folders"
    else:  # a folder that an older version began has no duplicates within it
        both = None
    items, taken = by_metadata(source.items, options.filters, options.keep)
    try:
        _settle(out, plan, source)
        with alone_in(out, part):
            if there := begin(out, retry_rejected, part, rehash):
                return there, True
            parts = join(out, part, "write", {"max_rejected": max_rejected})
            if options.filters.duplicates:
                looked, kept = items, out / RECEIPTS
                if both:
                    looked, kept = by_metadata(both.source.items, options.filters, options.keep)[0], both.seen
                how = source.reader, looked, options.filters, options.policy, workers, kept, progress, part
                items, others, _ = by_pixels(*how, both.side if both else None)
                taken += others
            buckets, rare = None, Rare()
            if len(options.policy.buckets) > 1:
                buckets = buckets_of(source.reader, items, out, options.policy, workers, progress, part)
                rare = Rare.below(options.bucket_min, Counter(buckets), options.policy)
                buckets = [rare.into.get(bucket, bucket) for bucket in buckets]
            policy = options.policy.to_dict() | {key: plan[key] for key in alike.MADE} | {"applied": "preparation"}
            about = source.about | {key: plan[key] for key in ("samples_per_shard", "seed", "samples", "list_sha256")}
            whole = {
                "shards": planning.shards(len(items), options, buckets),
                "classes": list(source.classes),
                "policy": policy | rare.recorded(),
                "source": about | planning.chosen(options),
                "entries": asdict(replace(source.entries, lost={})),  # a tar file may be lost to a later part alone
                "filtered": dict(taken),
                "samples": budget.samples,
            }
            if parts:
                parts.agree(WHOLE_NAME, whole)
            work = partial(write_shard, source.reader, out, options, retry_rejected, rehash)
            mine = planning.jobs(items, options, buckets, part)
            with tqdm(total=len(items) // part.of, unit="img", disable=not progress, mininterval=0.5) as bar:
                for _, outcome in in_processes(work, mine, workers):
                    budget.spend(_counted(source, outcome.rejected))
                    bar.update(outcome.samples)
            return (parts.leave(budget.spent(), close) if parts else _put_together(out, whole)), False
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error


def close(parts: Parts) -> Index:
    """Put the shards of all parts together; return the index.

    Raises:
        InputError: more samples were rejected than allowed, or not one can be used.
    """
    whole = parts.read(WHOLE_NAME)
    budget = Budget(parts.options["max_rejected"], whole["samples"])
    for counted in parts.counts():
        budget.add(counted)
    clear(parts.out)
    index = _put_together(parts.out, whole)
    shutil.rmtree(parts.out / UNPACKED, ignore_errors=True)
    return index


def _put_together(out: Path, whole: dict[str, Any]) -> Index:
    """The index of shards that are all there.

    Args:
        whole: what is known of them beside their receipts, as JSON has it.
    """
    classes, entries = Classes(tuple(whole["classes"])), Entries(**whole["entries"])
    about = whole["policy"], whole["source"], entries, whole["filtered"]
    return finish(out, range(whole["shards"]), lambda _: classes, "", *about)


def _check_faults(source: Source, max_rejected: float) -> None:
    """End before any work where what is known of the samples already is more than the budget."""
    faults = [Rejected.because(item.name, ValueError(item.fault)) for item in source.items if item.fault]
    Budget(max_rejected, len(source.items)).spend(_counted(source, tuple(faults)))


def _counted(source: Source, rejected: tuple[Rejected, ...]) -> tuple[Rejected, ...]:
    """Those that count towards --max-rejected: tar files that were lost as a whole have a budget of their own."""
    lost = tuple(f"{as_utf8(name)}/" for name in source.entries.lost)
    return tuple(one for one in rejected if not one.source.startswith(lost))


def _settle(out: Path, plan: dict[str, Any], source: Source) -> None:
    try:
        planning.settle(out, plan)
    except InputError as error:
        if name := next(iter(source.entries.unreadable), None):
            reason = source.entries.unreadable[name]
            raise InputError(f"{error}. Among its tar files {name!r} cannot be read now: {reason}") from error
        raise


def begin(out: Path, retry_rejected: bool, part: Part = WHOLE, rehash: bool = False) -> Index | None:
    """The index of a folder that is finished and whole; else make it ready for work."""
    if (index := finished_in(out)) and not (retry_rejected and index.rejected):
        if not rehash:
            return index
    else:
        (out / INDEX_NAME).unlink(missing_ok=True)
    (out / RECEIPTS).mkdir(exist_ok=True)
    if part.whole:
        clear(out)
    else:  # the rest may be at work of other parts
        clear_own(out, ".shard-*.tmp", part)
    return None


def finished_in(out: Path) -> Index | None:
    """The index of a folder, if it is finished and whole."""
    if not (out / INDEX_NAME).is_file():
        return None
    index = read_index(out)
    return index if _whole(out, index) else None


def clear(out: Path) -> None:
    """Remove what killed processes have left half-written."""
    for leftover in [*out.glob(".*.tmp"), *(out / RECEIPTS).glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)


def _whole(out: Path, index: Index) -> bool:
    try:
        check_table(out, index)
    except InputError:
        return False
    # A missing shard is written again; a changed one is found by its receipt, and named.
    return bool(index.base) or not missing_shards(out, index)
