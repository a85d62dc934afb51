"""Checks of what a run reads and writes: the command itself, shards, the run folder, free disk."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from megapix.checkpoint.folder import complete
from megapix.checkpoint.layout import PARTS
from megapix.config import Config
from megapix.data.locate import Located
from megapix.data.mix.located import find
from megapix.data.read import Decoder, ShardReader
from megapix.dist import World, barrier, gather
from megapix.doctor.verdict import Verdict
from megapix.errors import InputError
from megapix.train.resolve import resolve
from megapix.train.run_folder import same_everywhere

SEEN_SECONDS = 10.0
"""How long a file written by another node may take to appear (NFS caches folders)."""
SHARDS_TRIED = 4
"""Shards of which a rank reads the first and the last sample; ranks begin at different ones."""
RESERVE = 256 * 2**20
"""Bytes that should stay free beside a checkpoint: events, logs, and what others write meanwhile."""


def command(requested: Config, world: World, readable: bool, classes_given: bool = True) -> Verdict:
    """What `train` checks before its first step, the last checkpoint too, and whether all ranks have the same command.

    Every rank calls it; `readable` says whether this one can read the shards.

    Raises:
        CollectiveInputError: on every rank, if one has another command.
    """
    resolved, problem = None, "not checked: the shards cannot be read"
    if readable:
        try:
            resolved, problem = resolve(requested, world.size, classes_given=classes_given), ""
        except InputError as error:
            problem = str(error)
    on_all = not any(gather(world, problem))
    if resolved is None:
        return Verdict("command", "fail", problem)
    if on_all:
        same_everywhere(world, resolved)
    starts = "starts at 0"
    if resolved.saved:
        starts = f"resumes from {resolved.saved.folder} at {resolved.saved.state.counters.images_seen:,}"
    return Verdict("command", "ok", f"{starts} of {resolved.end:,} images, global batch {resolved.layout}")


def shards(requested: Config, world: World) -> Verdict:
    """Read and decode the first and the last sample of some shards.

    Raises:
        InputError: no data set there, or a sample that cannot be read; the file is named.
        ValueError: a sample that cannot be decoded.
    """
    data = find(requested.data)
    return _worst([_shards(one, requested, world) for one in ([data] if isinstance(data, Located) else data.sets)])


def _worst(verdicts: list[Verdict]) -> Verdict:
    """That of the first set at which somebody should look; with the details of all where all is well."""
    bad = [verdict for verdict in verdicts if verdict.status != "ok"]
    return bad[0] if bad else Verdict("shards", "ok", "; ".join(verdict.detail for verdict in verdicts))


def _shards(located: Located, requested: Config, world: World) -> Verdict:
    start = time.monotonic()
    entries = located.index.shards
    reader, decoder = ShardReader(located, requested.data), Decoder(located.index)
    tried = {(world.rank + i * max(1, len(entries) // SHARDS_TRIED)) % len(entries) for i in range(SHARDS_TRIED)}
    first = located.index.table.first
    ends = [sample for number in sorted(tried) for sample in (int(first[number]), int(first[number + 1]) - 1)]
    for sample in ends:
        encoded = reader.read(sample)
        try:
            decoder(encoded.data, encoded.bucket)
        except ValueError as error:
            raise ValueError(f"{reader.where(sample)}: {error}") from error
    detail = (
        f"{len(ends)} samples of {len(tried)} shards out of {len(entries)} read in {time.monotonic() - start:.1f} s"
    )
    if located.faults:
        return Verdict(
            "shards", "warn", f"{located.faults[0]} ({len(located.faults)} faults; samples will be replaced)"
        )
    return Verdict("shards", "ok", detail)


def run_folder(out: str, world: World) -> Verdict:
    """Each rank writes a file where the run folder is or will be, and must see all others'. Every rank calls it."""
    folder, token = gather(world, (str(existing(Path(out))), uuid.uuid4().hex))[0]
    mine = Path(folder) / f".doctor-{token}-{world.rank}"
    problem = ""
    try:
        mine.write_text(token)
    except OSError as error:
        problem = f"{folder} is not writable: {error.strerror}"
    wrote = [rank for rank, failed in enumerate(gather(world, problem)) if not failed]
    unseen = [] if problem else _unseen([mine.with_name(f".doctor-{token}-{rank}") for rank in wrote], token)
    barrier(world)
    if not problem:
        mine.unlink()
        if unseen:
            ranks = ", ".join(path.name.rpartition("-")[2] for path in unseen)
            problem = f"{folder}: what rank {ranks} wrote is not seen here; put the run on a file system that all share"
    if problem:
        return Verdict("run folder", "fail", problem)
    return Verdict("run folder", "ok", f"{folder} is writable, and seen by all ranks")


def _unseen(paths: list[Path], token: str) -> list[Path]:
    """Files that have not appeared in time."""
    deadline = time.monotonic() + SEEN_SECONDS
    while True:
        missing = [path for path in paths if not _holds(path, token)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def disk(requested: Config, parameters: int) -> Verdict:
    """The next checkpoint must fit on disk, and those that will be kept should."""
    folder = existing(Path(requested.out))
    one, free = 4 * len(PARTS) * parameters, shutil.disk_usage(folder).free
    detail = f"{_size(free)} free in {folder}, a checkpoint takes {_size(one)}"
    if free < one + RESERVE:
        return Verdict("disk", "fail", f"{detail}: the next one would not fit (with {_size(RESERVE)} to spare)")
    held = len(complete(Path(requested.out)))
    more = max(0, requested.checkpoint.keep + 1 - held)  # the new one is complete before the oldest goes
    if free < more * one + RESERVE:
        kept = f"checkpoint.keep = {requested.checkpoint.keep}"
        return Verdict("disk", "warn", f"{detail}: {more} more are to come ({kept}) and would not fit")
    return Verdict("disk", "ok", detail)


def existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    while not os.path.exists(path):  # False, too, where it may not be looked for
        path = path.parent
    return path


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
