"""What a run reads and writes: the command against its data and run folder, shards, a shared folder, room on disk."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path

from megapix import dist
from megapix.checkpoint import PARTS, complete
from megapix.config import Config
from megapix.data.decode import Decoder
from megapix.data.locate import locate
from megapix.data.read import ShardReader
from megapix.dist import World
from megapix.doctor.verdict import Verdict
from megapix.errors import InputError
from megapix.prepare import plan, same_everywhere

SEEN_SECONDS = 10.0
"""How long a file written by another node may take to appear (NFS caches folders)."""
SHARDS_TRIED = 4
"""Shards of which a rank reads the first and the last sample; ranks begin at different ones."""
RESERVE = 256 * 2**20
"""Bytes that should stay free beside a checkpoint: events, logs, and what others write meanwhile."""


def command(asked: Config, world: World, readable: bool) -> Verdict:
    """What `train` checks before its first step, the last checkpoint too, and whether all ranks were asked the same.

    Every rank calls it; `readable` says whether this one can read the shards.

    Raises:
        Agreed: on every rank, if one was asked for another run.
    """
    planned, problem = None, "not checked, for want of shards"
    if readable:
        try:
            planned, problem = plan(asked, world.size), ""
        except InputError as error:
            problem = str(error)
    on_all = not any(dist.gather(world, problem))
    if planned is None:
        return Verdict("command", "fail", problem)
    if on_all:
        same_everywhere(world, planned)
    starts = "starts at 0"
    if planned.saved:
        starts = f"goes on from {planned.saved.folder} at {planned.saved.state.counters.images_seen:,}"
    return Verdict("command", "ok", f"{starts} of {planned.end:,} images, global batch {planned.layout}")


def shards(asked: Config, world: World) -> Verdict:
    """Read and decode the first and the last sample of some shards.

    Raises:
        InputError: no data set there, or a sample that cannot be read; the file is named.
        ValueError: a sample that cannot be decoded.
    """
    start = time.monotonic()
    located = locate(asked.data)
    entries = located.index.shards
    reader, decoder = ShardReader(located, asked.data), Decoder(located.index)
    tried = {(world.rank + i * max(1, len(entries) // SHARDS_TRIED)) % len(entries) for i in range(SHARDS_TRIED)}
    ends, first = [], 0
    for number, entry in enumerate(entries):
        if number in tried:
            ends += [first, first + entry.samples - 1]
        first += entry.samples
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
    folder, token = dist.gather(world, (str(existing(Path(out))), uuid.uuid4().hex))[0]
    mine = Path(folder) / f".doctor-{token}-{world.rank}"
    problem = ""
    try:
        mine.write_text(token)
    except OSError as error:
        problem = f"{folder} is not writable: {error.strerror}"
    wrote = [rank for rank, failed in enumerate(dist.gather(world, problem)) if not failed]
    unseen = [] if problem else _unseen([mine.with_name(f".doctor-{token}-{rank}") for rank in wrote], token)
    dist.barrier(world)
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


def disk(asked: Config, parameters: int) -> Verdict:
    """The next checkpoint must fit, and those that will be kept should."""
    folder = existing(Path(asked.out))
    one, free = 4 * len(PARTS) * parameters, shutil.disk_usage(folder).free
    detail = f"{_size(free)} free in {folder}, a checkpoint takes {_size(one)}"
    if free < one + RESERVE:
        return Verdict("disk", "fail", f"{detail}: the next one would not fit (with {_size(RESERVE)} to spare)")
    held = len(complete(Path(asked.out)))
    more = max(0, asked.checkpoint.keep + 1 - held)  # the new one is complete before the oldest goes
    if free < more * one + RESERVE:
        kept = f"checkpoint.keep = {asked.checkpoint.keep}"
        return Verdict("disk", "warn", f"{detail}: {more} more are to come ({kept}) and would not fit")
    return Verdict("disk", "ok", detail)


def existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    while not os.path.exists(path):  # False, too, where it may not be looked for
        path = path.parent
    return path


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
