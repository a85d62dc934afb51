"""Shards from a source: plan, write in worker processes, then table and index.

Everything written is a function of the source's list and the options, so any number of workers, and any number of
interruptions, ends in the same bytes. A finished shard is checked by size and hash and not written again; the index
comes last, so a folder with an index is complete.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.filters.chosen import by_metadata, by_pixels
from data_prep.listing.base import Source
from data_prep.listing.classes import Classes
from data_prep.writing import plan as planning
from data_prep.writing.finish import finish
from data_prep.writing.plan import Options
from data_prep.writing.pool import Budget, alone_in, check_workers, in_processes, load_in_workers
from data_prep.writing.receipt import RECEIPTS, Rejected
from data_prep.writing.shard import write_shard
from data_prep.writing.survey import Rare, buckets_of
from megapix.errors import InputError
from megapix.shards.index import INDEX_NAME, Index, missing_shards, read_index
from megapix.shards.mix import alike
from megapix.shards.table import check_table


def write(
    source: Source,
    out: Path,
    options: Options,
    workers: int,
    max_rejected: float = 0.0,
    retry_rejected: bool = False,
    progress: bool = True,
    of: int = 0,
) -> tuple[Index, bool]:
    """Write `source` into the folder `out`, or resume it; return the index, and whether it was finished already.

    Args:
        workers: processes.
        max_rejected: largest share of samples that may be left out because they cannot be used.
        retry_rejected: write shards with rejected samples again.
        of: samples that the share is of; 0 for those of `source`, which may be a part of a set alone.

    Raises:
        InputError: an option out of range, a column that no sample has, a folder of something else or of another plan,
            more rejected samples than allowed, or a file that cannot be written; what is finished stays.
    """
    from tqdm import tqdm

    load_in_workers("data_prep.writing.shard", "webdataset")  # which loads torch, and takes seconds
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
    items, taken = by_metadata(source.items, options.filters, options.keep)
    try:
        _settle(out, plan, source)
        with alone_in(out):
            if there := begin(out, retry_rejected):
                return there, True
            if options.filters.duplicates:
                items, others, _ = by_pixels(
                    source.reader, items, options.filters, options.policy, workers, out, progress
                )
                taken += others
            buckets, rare = None, Rare()
            if len(options.policy.buckets) > 1:
                buckets = buckets_of(source.reader, items, out, options.policy, workers, progress)
                rare = Rare.below(options.bucket_min, Counter(buckets), options.policy)
                buckets = [rare.into.get(bucket, bucket) for bucket in buckets]
            parts = 0
            work = partial(write_shard, source.reader, out, options, retry_rejected)
            with tqdm(total=len(items), unit="img", disable=not progress, mininterval=0.5) as bar:
                for _, outcome in in_processes(work, planning.jobs(items, options, buckets), workers):
                    parts += 1
                    budget.spend(outcome.rejected)
                    bar.update(outcome.samples)
            policy = options.policy.to_dict() | {key: plan[key] for key in alike.MADE} | {"applied": "preparation"}
            policy |= rare.recorded()
            about = source.about | {key: plan[key] for key in ("samples_per_shard", "seed", "samples", "list_sha256")}
            about |= planning.chosen(options)
            classes = Classes(tuple(source.classes))
            return finish(out, range(parts), lambda _: classes, "", policy, about, source.entries, taken), False
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error


def _check_faults(source: Source, max_rejected: float) -> None:
    """End before any work where what is known of the samples already is more than the budget."""
    faults = [Rejected.because(item.name, ValueError(item.fault)) for item in source.items if item.fault]
    Budget(max_rejected, len(source.items)).spend(tuple(faults))


def _settle(out: Path, plan: dict[str, Any], source: Source) -> None:
    try:
        planning.settle(out, plan)
    except InputError as error:
        if name := next(iter(source.entries.unreadable), None):
            reason = source.entries.unreadable[name]
            raise InputError(f"{error}. Among its tar files {name!r} cannot be read now: {reason}") from error
        raise


def begin(out: Path, retry_rejected: bool) -> Index | None:
    """The index of a folder that is finished and whole; else make it ready for work."""
    if (out / INDEX_NAME).is_file():
        index = read_index(out)
        if not (retry_rejected and index.rejected) and _whole(out, index):
            return index
        (out / INDEX_NAME).unlink()
    (out / RECEIPTS).mkdir(exist_ok=True)
    for leftover in [*out.glob(".*.tmp"), *(out / RECEIPTS).glob(".*.tmp")]:
        leftover.unlink()
    return None


def _whole(out: Path, index: Index) -> bool:
    try:
        check_table(out, index)
    except InputError:
        return False
    # A missing shard is written again; a changed one is found by its receipt, and named.
    return bool(index.base) or not missing_shards(out, index)
