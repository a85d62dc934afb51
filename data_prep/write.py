"""Shards from a source: plan, write in worker processes, then table and index.

Everything written is a function of the source's list and the options, so any number of workers, and any number of
interruptions, ends in the same bytes. A finished shard is checked by size and hash and not written again; the index
comes last, so a folder with an index is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_prep import plan as planning
from data_prep.plan import Job, Options
from data_prep.shard import RECEIPTS, Receipt, Rejected, finished, write_shard
from data_prep.source import Source
from megapix import shards
from megapix.errors import InputError
from megapix.shards import ClassEntry, Index, write_atomic

REJECTED_NAME = "rejected.jsonl"
IMAGE_KEYS = ("policy", "size", "extension", "quality", "min_side")
"""Keys of the plan that say how images were made."""


def write(
    source: Source,
    out: Path,
    options: Options,
    workers: int,
    max_rejected: float = 0.0,
    retry_rejected: bool = False,
    progress: bool = True,
) -> tuple[Index, bool]:
    """Write `source` into the folder `out`, or go on with it; return the index, and whether it was finished already.

    Args:
        workers: processes.
        max_rejected: largest share of samples that may be left out because they cannot be used.
        retry_rejected: write shards with rejected samples again.

    Raises:
        InputError: an option out of range, a folder of something else or of another plan, more rejected samples than
            allowed, or a file that cannot be written; what is finished stays.
    """
    options.check()
    if workers < 1:
        raise InputError(f"--workers = {workers}: expected at least 1")
    if not 0.0 <= max_rejected <= 1.0:
        raise InputError(f"--max-rejected = {max_rejected}: expected a share, 0 to 1")
    plan = planning.describe(source, options)
    try:
        planning.settle(out, plan)
        if (out / shards.INDEX_NAME).is_file():
            index = shards.read_index(out)
            if not (retry_rejected and index.rejected) and _whole(out, index):
                return index, True
            (out / shards.INDEX_NAME).unlink()
        (out / RECEIPTS).mkdir(exist_ok=True)
        for leftover in [*out.glob(".*.tmp"), *(out / RECEIPTS).glob(".*.tmp")]:
            leftover.unlink()
        receipts = _write_all(source, out, options, workers, max_rejected, retry_rejected, progress)
        return _finish(source, out, options, plan, receipts), False
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error


def _write_all(
    source: Source,
    out: Path,
    options: Options,
    workers: int,
    max_rejected: float,
    retry_rejected: bool,
    progress: bool,
) -> list[Receipt]:
    from tqdm import tqdm

    receipts: dict[int, Receipt] = {}
    todo: list[Job] = []
    with tqdm(total=len(source.items), unit="img", disable=not progress, mininterval=0.5) as bar:
        budget = _Budget(len(source.items), max_rejected)
        for job in planning.jobs(source.items, options):
            there = finished(out, job.number)
            if there is None or (retry_rejected and there.rejected):
                todo.append(job)
                continue
            receipts[job.number] = there
            budget.spend(there)
            bar.update(len(job.items))
        bar.initial = bar.n  # the rate counts what is done now
        work = partial(write_shard, source.reader, out, options)
        for job, receipt in _parallel(work, todo, workers):
            receipts[job.number] = receipt
            budget.spend(receipt)
            bar.update(len(job.items))
    return [receipts[number] for number in sorted(receipts)]


class _Budget:
    """Counts rejected samples and stops the run when there are too many."""

    def __init__(self, samples: int, share: float) -> None:
        self.samples, self.share, self.rejected = samples, share, 0

    def spend(self, receipt: Receipt) -> None:
        """Count a shard's rejected samples.

        Raises:
            InputError: the budget is used up; names the latest sample and the reason.
        """
        self.rejected += len(receipt.rejected)
        if self.rejected > self.share * self.samples:
            last = receipt.rejected[-1]
            raise InputError(
                f"{self.rejected} of {self.samples} samples cannot be used, --max-rejected allows {self.share:g} of "
                f"them; the latest is {last.source!r}: {last.reason}"
            )


def _parallel(work: Any, todo: list[Job], workers: int) -> Iterator[tuple[Job, Receipt]]:
    """Run the jobs in processes, in order of completion, with no more of them queued than keeps the workers busy."""
    if not todo:
        return
    with ProcessPoolExecutor(min(workers, len(todo)), get_context("forkserver")) as pool:
        remaining = iter(todo)
        running: dict[Future[Receipt], Job] = {pool.submit(work, job): job for job in islice(remaining, 2 * workers)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    for following in islice(remaining, 1):
                        running[pool.submit(work, following)] = following
                    yield job, future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _finish(source: Source, out: Path, options: Options, plan: dict[str, Any], receipts: list[Receipt]) -> Index:
    entries = [receipt.entry for receipt in receipts if receipt.entry]
    if not entries:
        raise InputError("not one sample can be used")
    # Shards that were rejected whole leave a gap in the numbers: records count places in the index's list.
    place = {entry.name: number for number, entry in enumerate(entries)}
    records = [r._replace(shard=place[c.entry.name]) for c in receipts if c.entry for r in c.records]
    table = b"".join(shards.RECORD.pack(*record) for record in records)
    write_atomic(out / shards.TABLE_NAME, table)
    rejected = [one for receipt in receipts for one in receipt.rejected]
    _write_rejected(out, rejected)
    counts = Counter(record.label for record in records)
    index = Index(
        samples=len(records),
        image_size=options.size,
        image_extension=options.extension,
        classes=tuple(ClassEntry(name, counts[label]) for label, name in enumerate(source.classes)),
        shards=tuple(entries),
        table_sha256=hashlib.sha256(table).hexdigest(),
        image_policy={key: plan[key] for key in IMAGE_KEYS},
        source={key: value for key, value in plan.items() if key not in (*IMAGE_KEYS, "classes")},
        rejected=len(rejected),
    )
    shards.write_index(out, index)
    return index


def _whole(out: Path, index: Index) -> bool:
    try:
        shards.check_shards(out, index)
    except InputError:
        return False  # a missing shard is written again; a changed one is found by its receipt, and named
    return True


def _write_rejected(out: Path, rejected: list[Rejected]) -> None:
    path = out / REJECTED_NAME
    if rejected:
        lines = (json.dumps(one.__dict__, ensure_ascii=False) for one in rejected)
        write_atomic(path, ("\n".join(lines) + "\n").encode())
    else:
        path.unlink(missing_ok=True)
