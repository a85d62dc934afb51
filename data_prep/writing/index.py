"""An index over WebDataset tar files that exist already, local or remote, without rewriting a byte.

Each tar file is read once, in a worker process: hashed, its samples listed, every image decoded, and its size held
against the image policy, which the loader applies when it reads them; `check` asks for less than that. A remote file is
copied to a temporary one for that long. The work is kept in receipts that go by the files' names, so an interrupted
command resumes where it was, and one over a set that has grown, shrunk or changed reads what is new. A tar file that
cannot be read is rejected as a whole, within a budget of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_prep.filters.fingerprints import fingerprint
from data_prep.filters.rules import NO_FILTERS, Filters
from data_prep.listing.archives import DamagedTar
from data_prep.listing.base import Entries, Filtered, as_utf8
from data_prep.listing.classes import NONE, NoClass, is_name
from data_prep.listing.img2dataset import Rows, table_of
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.tar_samples import TarSample, samples_of
from data_prep.listing.tar_set import class_names_of, recorded_base, tars_of_split
from data_prep.listing.tars import TarBudget
from data_prep.parts.folder import join
from data_prep.parts.indexed import UNFINISHED, Tally, close, put_together
from data_prep.parts.part import WHOLE, Part
from data_prep.writing import plan as planning
from data_prep.writing import receipt
from data_prep.writing.held_out import HoldOut, folder_beside
from data_prep.writing.pool import Budget, Outcome, alone_in, check_workers, in_processes, load_in_workers
from data_prep.writing.receipt import CHECKS, NO_TABLE, Receipt, Rejected, Sample, TarState
from data_prep.writing.write import WHOLE_NAME, begin
from megapix.errors import InputError
from megapix.files import sha256_of
from megapix.shards.image_policy import Policy
from megapix.shards.index import INDEX_NAME, Index, ShardEntry
from megapix.shards.storage import Access, Local, Refused, Storage, open_storage

INDEX_KIND = "index of WebDataset shards"
GROWS = ("shards", "list_sha256")
"""Keys of the plan that change where tar files come or go."""


class Work(NamedTuple):
    """What a worker process needs to index any tar file."""

    place: str
    """Folder or URL of the tar files."""
    access: Access
    policy: Policy
    reading: Reading
    filters: Filters
    out: Path
    rehash: bool
    check: str = CHECKS[-1]


def index(
    pattern: str,
    out: Path,
    policy: Policy,
    workers: int,
    max_rejected: float,
    access: Access,
    progress: bool = True,
    reading: Reading = PLAIN,
    rehash: bool = False,
    hold: HoldOut | None = None,
    bucket_min: int = 0,
    filters: Filters = NO_FILTERS,
    check: str = CHECKS[-1],
    say: Callable[[str], None] = lambda _: None,
    part: Part = WHOLE,
) -> tuple[Index, bool]:
    """Index the tar files of `pattern` into the folder `out`; return the index, and whether it was finished already.

    Where `out` has the index of another list or state of these tar files, that one is kept as a version
    (`versions.py`).

    Args:
        rehash: read every tar file and compare its hash, whatever its size and time of modification say.
        hold: samples that go into a second index over the same tar files (`held_out.folder_beside`).
        check: how closely images are looked at, one of CHECKS; what was looked at as closely before is not read again.
        say: is called with each line that the command prints.
        part: the share of the tar files that this process reads.

    Raises:
        PartDone: this part is read, and others are not.
        InputError: nothing there, several splits without train, more names than classes have, a key of --captions or a
            column that no sample has, an `out` of other files or options, or more rejected samples or tar files than
            allowed.
    """
    from tqdm import tqdm

    load_in_workers("data_prep.writing.index")
    listed, tally = Entries(), Tally(Budget(max_rejected), TarBudget(reading.max_rejected_tars), not reading.classes)
    filters = filters.with_least_side(policy.min_side)
    check_workers(workers)
    if filters.duplicates and check != CHECKS[-1]:
        raise InputError(
            f"--check {check} decodes no image, which {filters.duplicates.option} compares; expected decode"
        )
    planning.check_bucket_min(bucket_min, policy)
    policy = planning.as_begun(out, policy)
    place, names, split = tars_of_split(pattern, access, reading, listed)
    for line in listed.remarks:
        say(line)
    listed.remarks.clear()
    base = recorded_base(place, out, planning.begun(out).get("base", ""))
    about = {**reading.recorded(), **split, **filters.recorded()}
    plan = {
        "kind": INDEX_KIND,
        **planning.of_policy(policy, bucket_min),
        **about,
        **(reading.classes.recorded() if reading.classes else {}),
        **(hold.recorded() if hold else {}),
        "base": base,
        "shards": len(names),
        "list_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
    known = () if reading.classes == NONE else class_names_of(place, names)
    try:
        folders = [out, folder_beside(out)] if hold else [out]
        for folder in folders:
            # Receipts hold labels as the tar files do: what they mean may be said anew before there is an index.
            planning.settle(folder, plan, GROWS if (folder / INDEX_NAME).is_file() else (*GROWS, "labels"))
        with alone_in(out, part):
            there = {folder: index for folder in folders if (index := begin(folder, retry_rejected=False, part=part))}
            receipt.by_name(out)
            work = Work(place, access, policy, reading, filters, out, rehash, check)
            unfinished = out / receipt.RECEIPTS / UNFINISHED
            finished = len(there) == len(folders) and not unfinished.exists()
            if finished and _are_of(there, plan["list_sha256"], work, names, workers):
                return there[out], True
            shares = {"max_rejected": max_rejected, "max_rejected_tars": reading.max_rejected_tars}
            parts = join(out, part, "index", shares | {"check": check})
            whole = {
                "names": names,
                "classes": asdict(reading.classes) if reading.classes else None,
                "known": known,
                "base": base,
                "policy": policy.to_dict() | {"applied": "loading"},
                "source": {"kind": plan["kind"], "list_sha256": plan["list_sha256"], **about},
                "listed": asdict(listed),
                "hold": hold.option if hold else "",
                "keys": reading.keys,
                "columns": filters.named(),
                "shown": repr(pattern),
                "bucket_min": bucket_min,
                "duplicates": filters.duplicates,
            }
            if parts:
                parts.agree(WHOLE_NAME, whole, free=("shown",))
            for folder in folders:
                planning.record(folder, plan)
            unfinished.touch()
            tally.tars.files, mine = len(names), list(part.mine(names))
            with tqdm(total=len(mine), unit="shard", disable=not progress, mininterval=0.5) as bar:
                for _, outcome in in_processes(partial(_index_file, work), mine, workers):
                    bar.update()
                    tally.count(outcome)
            if parts:
                return parts.leave(tally.spent(), partial(close, say=say)), False
            return put_together(out, whole, tally, there, say), False
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error


@contextmanager
def local_copy(storage: Storage, name: str, beside: Path) -> Iterator[Path]:
    """A tar file as a local path: itself, or a temporary copy in the folder `beside`."""
    if isinstance(storage, Local):
        yield storage.base / name
        return
    with tempfile.NamedTemporaryFile(dir=beside, prefix=".copy-", suffix=".tmp") as file:
        storage.fetch(name, Path(file.name), storage.size(name))
        yield Path(file.name)


@contextmanager
def rows_beside(storage: Storage, name: str, beside: Path, reading: Reading) -> Iterator[Rows]:
    """The rows of img2dataset's table of a tar file, if it has one; a remote one is copied when it is asked for."""
    with ExitStack() as copies:

        def find() -> Path | None:
            if _table_state(storage, name) == NO_TABLE:
                return None
            return copies.enter_context(local_copy(storage, _table(storage, name), beside))

        yield Rows(find, reading)


def _table(storage: Storage, name: str) -> str:
    """What img2dataset's table of a tar file is called."""
    path, mark, query = (name, "", "") if isinstance(storage, Local) else name.partition("?")
    return f"{table_of(path)}{mark}{query}"


def _table_state(storage: Storage, name: str) -> str:
    """What changes with the content of that table, or NO_TABLE."""
    try:
        return " ".join(map(str, storage.state(_table(storage, name))))
    except (OSError, Refused):
        return NO_TABLE


def _index_file(work: Work, name: str) -> Outcome:
    storage = open_storage(work.place, work.access)
    state, made = _state(storage, name), receipt.load(work.out, name)
    good = made is not None and _as_asked(made, storage, name, work.check)
    if made is None or made.tar is None or not good or not _same(made, state) or work.rehash:
        copies = work.out / receipt.RECEIPTS
        with local_copy(storage, name, copies) as path, rows_beside(storage, name, copies, work.reading) as rows:
            if not path.is_file():
                raise InputError(f"{storage.where(name)} does not exist")
            sha256 = sha256_of(path)
            table = made.tar.table if made and made.tar else ""
            if made is None or made.tar is None or made.tar.sha256 != sha256 or not good:
                made = _indexed(path, storage.where(name), name, sha256, work, rows)
                table = _table_state(storage, name) if rows.asked else ""
            made = replace(made, tar=TarState(name, *state, sha256, table))
        made.save(work.out, name)
    labels = {sample.label for sample in made.samples if sample.label != -1 and is_name(sample.label)}
    samples = len(made.samples) + len(made.rejected) + sum(made.filtered.values())
    return Outcome(samples, made.rejected, made.caption_keys, tuple(labels), made.columns, made.unreadable)


def _are_of(there: Mapping[Path, Index], list_sha256: str, work: Work, names: list[str], workers: int) -> bool:
    """Whether finished indexes are of these tar files, and each of these is as it was."""
    if any(index.source.get("list_sha256") != list_sha256 for index in there.values()):
        return False
    return all(stands for _, stands in in_processes(partial(_stands, work), names, workers))


def _stands(work: Work, name: str) -> bool:
    """Whether the tar file is the one that its receipt is of."""
    storage, made = open_storage(work.place, work.access), receipt.load(work.out, name)
    if made is None or work.rehash:
        return False
    return _same(made, _state(storage, name)) and _as_asked(made, storage, name, work.check)


def _as_asked(made: Receipt, storage: Storage, name: str, check: str) -> bool:
    """Whether a receipt's images were looked at as closely as is asked for, and its table has not changed."""
    table = made.tar.table if made.tar else ""
    looked = made.unreadable or CHECKS.index(made.check) >= CHECKS.index(check)
    return looked and (not table or table == _table_state(storage, name))


def _same(made: Receipt, state: tuple[int, str]) -> bool:
    """Whether size and time (or ETag) of the tar file are those of its receipt; one of an older version has no time."""
    return made.tar is not None and (made.tar.bytes, made.tar.changed or state[1]) == state


def _state(storage: Storage, name: str) -> tuple[int, str]:
    try:
        return storage.state(name)
    except FileNotFoundError as error:
        raise InputError(f"{storage.where(name)} does not exist") from error
    except OSError as error:
        raise InputError(f"{storage.where(name)}: cannot be read: {error.strerror or error}") from error


def _indexed(path: Path, shown: str, name: str, sha256: str, work: Work, rows: Rows) -> Receipt:
    reading, filters, counted = work.reading, work.filters, Entries()
    try:
        listed = samples_of(path, counted, reading, rows, shown)
    except DamagedTar as error:  # the tar file is one entry that is rejected
        return Receipt((), (), (Rejected.because(name, error),), listed=Entries(1), unreadable=True)
    found: list[tuple[int, Sample, TarSample]] = []
    rejected: list[Rejected] = []
    noted: dict[str, list[int]] = defaultdict(list)
    taken: Counter[str] = Counter()
    prints: list[str] = []
    with open(path, "rb") as file:
        for sample in listed:
            if sample.fault:
                rejected.append(Rejected.because(f"{name}/{sample.name}", ValueError(sample.fault)))
                continue
            if option := filters.of_sample(sample.caption, sample.about):
                taken[option] += 1
                continue
            # Which labels are classes is known when those of all tar files are: `finish` settles it.
            label = -1 if isinstance(sample.label, NoClass) else sample.label
            data = os.pread(file.fileno(), sample.size, sample.offset)
            try:
                bucket, notes, print_ = _look(data, work)
            except Filtered as filtered:
                taken[filtered.option] += 1
                continue
            except ValueError as error:
                rejected.append(Rejected.because(f"{name}/{sample.name}", error))
                continue
            for note in notes:
                noted[note].append(len(found))
            if filters.duplicates:
                prints.append(print_)
            crc = zlib.crc32(data)
            found.append((bucket, Sample(0, sample.size, sample.offset, label, crc, sample.caption), sample))
    size = path.stat().st_size
    buckets = sorted({bucket for bucket, *_ in found})
    entries = tuple(ShardEntry(name, sum(bucket == b for bucket, *_ in found), size, sha256, b) for b in buckets)
    samples = tuple(sample._replace(entry=buckets.index(bucket)) for bucket, sample, _ in found)
    names = tuple(as_utf8(f"{name}/{of.name}") for *_, of in found)
    no_class = tuple(
        (n, of.label.reason) for n, (*_, of) in enumerate(found) if isinstance(of.label, NoClass) and of.label.reason
    )
    has = tuple(key for key, _ in reading.keys if any(key in sample.caption_keys for sample in listed))
    there = {column for sample in listed if sample.about for column in json.loads(sample.about)}
    return Receipt(
        entries,
        samples,
        tuple(rejected),
        has,
        filtered=dict(taken),
        notes={note: len(places) for note, places in noted.items()},
        listed=counted,
        names=names,
        no_class=no_class,
        columns=tuple(column for column in filters.columns if column in there),
        prints=tuple(prints),
        noted={note: tuple(places) for note, places in noted.items()} if filters.duplicates else {},
        check=work.check,
    )


def _look(data: bytes, work: Work) -> tuple[int, tuple[str, ...], str]:
    """(bucket, notes, fingerprint in hexadecimal) of an image, looked at as closely as is asked for.

    Raises:
        Filtered: it is not wanted for its size. ValueError: it cannot be used.
    """
    policy, filters = work.policy, work.filters
    if filters.sizes and (option := filters.of_size(*policy.size_of(data))):
        raise Filtered(option)
    if work.check == "none" and len(policy.buckets) < 2:
        return 0, (), ""
    print_ = ""
    if work.check == "decode":
        pixels, size, own = policy.read(data)
        print_ = fingerprint(pixels, filters.duplicates).hex() if filters.duplicates else ""
    else:
        size, own = policy.header(data)
    bucket = policy.bucket_of(*size)
    policy.check_size(*size, bucket)
    return bucket, policy.notes_of(size, own, bucket), print_
