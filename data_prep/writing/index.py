"""An index over WebDataset tar files that exist already, local or remote, without rewriting a byte.

Each tar file is read once, in a worker process: hashed, its samples listed, every image decoded and put through the
image policy, which the loader then applies again when it reads them. A remote file is copied to a temporary one for
that long. The work is kept in receipts, so an interrupted command resumes where it was.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data_prep.sources.base import UNCLASSED, Entries
from data_prep.sources.captions import check_found
from data_prep.sources.reading import PLAIN, Reading
from data_prep.sources.shards import names_beside
from data_prep.sources.tar_samples import labels_of, samples_of
from data_prep.writing import plan as planning
from data_prep.writing import receipt
from data_prep.writing.finish import finish
from data_prep.writing.pool import Budget, Outcome, alone_in, check_workers, in_processes
from data_prep.writing.receipt import Receipt, Rejected, Sample
from data_prep.writing.write import begin
from megapix.errors import InputError
from megapix.files import sha256_of
from megapix.shards.image_policy import Policy
from megapix.shards.index import Index, ShardEntry
from megapix.shards.storage import Access, Local, Storage, is_url, open_storage, protocol_of


class Part(NamedTuple):
    """One tar file to index."""

    number: int
    name: str


def tar_files(pattern: str, access: Access) -> tuple[str, list[str]]:
    """(folder or URL, names below it in order) of the tar files that `pattern` names.

    Args:
        pattern: a folder or URL that lists its files, one tar file, or WebDataset's braces,
            'https://host/train-{0000..1023}.tar'.

    Raises:
        InputError: a protocol that is not read, nothing there, or no tar file.
    """
    from braceexpand import braceexpand

    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern!r}: the braces are not closed") from error
    if is_url(pattern):
        protocol_of(pattern)
    if len(paths) == 1 and not pattern.endswith(".tar"):
        base = pattern.rstrip("/") if is_url(pattern) else str(Path(pattern).resolve())
        storage = open_storage(base, access)
        if isinstance(storage, Local) and not Path(base).is_dir():
            raise InputError(f"{pattern!r} is not a folder or a tar file")
        names = [name for name in storage.names() if name.endswith(".tar") and not name.startswith(".")]
        if not names:
            raise InputError(f"{pattern!r} holds no tar file")
        return base, names
    if not is_url(pattern):
        paths = [str(Path(path).resolve()) for path in paths]
    base = paths[0].rpartition("/")[0]
    while not all(path.startswith(f"{base}/") for path in paths):
        base = base.rpartition("/")[0]
    if is_url(pattern) and base.count("/") < 2:
        raise InputError(f"{pattern!r}: the tar files lie on several hosts; expected one")
    names = [path[len(base) + 1 :] for path in paths]
    base = base or "/"
    if len(set(names)) < len(names):
        raise InputError(f"{pattern!r} names a tar file twice")
    return base, names


def index(
    pattern: str,
    out: Path,
    policy: Policy,
    workers: int,
    max_rejected: float,
    access: Access,
    progress: bool = True,
    reading: Reading = PLAIN,
) -> tuple[Index, bool]:
    """Index the tar files of `pattern` into the folder `out`; return the index, and whether it was finished already.

    Raises:
        InputError: nothing there, a tar file that is damaged or cannot be read, a key that occurs twice, samples with
            and without a class, a key of --captions that no sample has, an `out` of other files or options, or more
            rejected samples than allowed.
    """
    from tqdm import tqdm

    budget = Budget(max_rejected)
    check_workers(workers)
    base, names = tar_files(pattern, access)
    plan = {
        "kind": "index of WebDataset shards",
        **planning.of_policy(policy),
        **reading.recorded(),
        "base": base,
        "shards": len(names),
        "list_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
    }
    known = () if is_url(base) else names_beside(Path(base))
    try:
        planning.settle(out, plan)
        with alone_in(out):
            if there := begin(out, retry_rejected=False):
                return there, True
            work = partial(_index_file, base, access, policy, reading, out)
            parts = [Part(number, name) for number, name in enumerate(names)]
            with tqdm(total=len(parts), unit="shard", disable=not progress, mininterval=0.5) as bar:
                seen, found = 0, set[str]()
                for done, (_, outcome) in enumerate(in_processes(work, parts, workers), 1):
                    seen += outcome.samples
                    budget.samples = seen * len(parts) // done  # if the others are like these; at the end, exactly
                    budget.spend(outcome.rejected)
                    found.update(outcome.caption_keys)
                    bar.update()
            check_found(reading.keys, found, repr(pattern))
            image_policy = policy.to_dict() | {"applied": "loading"}
            about = {"kind": plan["kind"], "list_sha256": plan["list_sha256"], **reading.recorded()}
            return finish(out, len(parts), partial(_class_names, known), base, image_policy, about), False
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error


def _class_names(known: tuple[str, ...], largest: int) -> tuple[str, ...]:
    """Those of an index beside the shards, else the numbers; one name where no sample has a class."""
    if largest < 0:
        return (UNCLASSED,)
    return known if len(known) > largest else tuple(str(number) for number in range(largest + 1))


@contextmanager
def local_copy(storage: Storage, name: str, beside: Path) -> Iterator[Path]:
    """A tar file as a local path: itself, or a temporary copy in the folder `beside`."""
    if isinstance(storage, Local):
        yield storage.base / name
        return
    with tempfile.NamedTemporaryFile(dir=beside, prefix=".copy-", suffix=".tmp") as file:
        storage.fetch(name, Path(file.name), storage.size(name))
        yield Path(file.name)


def _index_file(base: str, access: Access, policy: Policy, reading: Reading, out: Path, part: Part) -> Outcome:
    storage = open_storage(base, access)
    made = receipt.load(out, part.number)
    if made is None or any(entry.bytes != _size(storage, entry.name) for entry in made.entries):
        with local_copy(storage, part.name, out / receipt.RECEIPTS) as path:
            made = _indexed(path, storage.where(part.name), part.name, policy, reading)
        made.save(out, part.number)
    return Outcome(len(made.samples) + len(made.rejected), made.rejected, made.caption_keys)


def _size(storage: Storage, name: str) -> int:
    try:
        return storage.size(name)
    except OSError as error:
        raise InputError(f"{storage.where(name)}: cannot be read: {error.strerror or error}") from error


def _indexed(path: Path, shown: str, name: str, policy: Policy, reading: Reading) -> Receipt:
    from megapix.shards.pixels import decode

    if not path.is_file():
        raise InputError(f"{shown} does not exist")
    counted = Entries()
    listed = samples_of(path, counted, reading, shown)
    found: list[tuple[int, Sample]] = []
    rejected: list[Rejected] = []
    with open(path, "rb") as file:
        labels_of(listed, shown)
        for sample in listed:
            if sample.fault:
                rejected.append(Rejected.because(f"{name}/{sample.name}", ValueError(sample.fault)))
                continue
            label = -1 if sample.label is None else sample.label  # `finish` sees whether other tar files have classes
            data = os.pread(file.fileno(), sample.size, sample.offset)
            try:
                pixels = decode(data, policy.background)
                bucket = policy.bucket_of(*pixels.shape[:2])
                policy.apply(pixels, bucket)
            except ValueError as error:
                rejected.append(Rejected.because(f"{name}/{sample.name}", error))
                continue
            crc = zlib.crc32(data)
            found.append((bucket, Sample(0, sample.size, sample.offset, label, crc, sample.caption)))
    size, sha256 = path.stat().st_size, sha256_of(path)
    buckets = sorted({bucket for bucket, _ in found})
    entries = tuple(ShardEntry(name, sum(bucket == b for bucket, _ in found), size, sha256, b) for b in buckets)
    samples = tuple(sample._replace(entry=buckets.index(bucket)) for bucket, sample in found)
    has = tuple(key for key, _ in reading.keys if any(key in sample.caption_keys for sample in listed))
    return Receipt(entries, samples, tuple(rejected), has, listed=counted)
