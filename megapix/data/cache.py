"""Whole remote shards on a local disk, shared by every process of a node, within a bound.

    CACHE/SHA256.tar     a complete shard, named by its hash, so nothing in it can be stale
    CACHE/SHA256.part    one that is being fetched; it has its full size from the start, which reserves the space
    CACHE/SHA256.lock    held (flock) by the process that fetches it; the system lets go of it when the process dies
    CACHE/.room.lock     held while space is counted and made

A shard gets its name after its size and hash were checked, so a process that is killed leaves at most a `.part`, and
the next one that wants the shard, or room, takes that over. Space is made by removing the shards that were used
longest ago; a read that has one open finishes with it.

`prefetch` has threads fetch shards that will be needed soon, several at a time; what they cannot fetch is left to the
read that needs it.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Thread

from megapix.errors import InputError, StorageError
from megapix.files import locked
from megapix.outage import FULL, error_of, persist
from megapix.shards.index import ShardEntry
from megapix.shards.storage import Remote

POLL = 0.05
"""Seconds between looks for room while other processes fill it."""
FETCHERS = 4
"""Shards that a process fetches ahead at the same time."""
OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")
"""What may be counted and removed: nothing else in the folder is touched."""


class DamagedShard(InputError):
    """A whole tar file that is not what the index says."""


class CachedShards:
    """Reads shards of a URL from the cache, fetching each when it is first needed.

    Args:
        remote: where the shards lie.
        folder: the cache; made if it is missing.
        limit: bytes that it may hold.
    """

    def __init__(self, remote: Remote, folder: Path, limit: int) -> None:
        self.remote, self.folder, self.limit = remote, folder, limit
        self._ahead = Remote(remote.base, replace(remote.access, outage_minutes=0.0))
        self.hits = self.misses = 0
        self._damaged: dict[str, str] = {}
        """Shards that are not what the index says: they are not fetched for each of their samples."""
        self._wanted: Queue[ShardEntry] = Queue()
        self._pending: set[str] = set()
        """Hashes of the shards in that queue, and of the one being fetched."""
        self._threads: list[Thread] = []
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        """Those bytes of a shard, or fewer where it ends.

        Raises:
            StorageError: the shard cannot be fetched now, or the disk is full. DamagedShard: it is not what the index
                says. InputError: the server refuses it, or the cache cannot hold it.
        """
        if shard.sha256 in self._damaged:
            raise DamagedShard(self._damaged[shard.sha256])
        try:
            data, fetched = persist(f"data.cache = {str(self.folder)!r}", lambda: self._read(shard, offset, size))
        except OSError as error:
            full = " (the disk is full)" if error.errno in FULL else ""
            raise error_of(error, f"data.cache = {str(self.folder)!r}: {error.strerror or error}{full}") from error
        self.misses += fetched
        self.hits += not fetched
        return data

    def _read(self, shard: ShardEntry, offset: int, size: int) -> tuple[bytes, bool]:
        """Those bytes, and whether the shard had to be fetched for them."""
        # Opened for each read: a shard that was removed and is still open would hold its space.
        descriptor, fetched = self._ready(shard, self.remote)
        try:
            return os.pread(descriptor, size, offset), fetched
        finally:
            os.close(descriptor)

    def prefetch(self, shards: Iterable[ShardEntry]) -> None:
        """Have these fetched in the background, in order, unless they are there."""
        for key, shard in {shard.sha256: shard for shard in shards}.items():
            if key not in self._pending | self._damaged.keys() and not self._path(shard, "tar").exists():
                self._pending.add(key)
                self._wanted.put(shard)
        if not self._wanted.empty() and not self._threads:
            self._threads = [Thread(target=self._fetch_ahead, daemon=True) for _ in range(FETCHERS)]
            for thread in self._threads:
                thread.start()

    def _fetch_ahead(self) -> None:
        while True:
            shard = self._wanted.get()
            # It waits for no server, with the shard's lock held: the read that needs the shard will, or fail with the
            # reason if that still holds. Nor for another process that fetches the shard.
            with suppress(InputError, StorageError, OSError):
                os.close(self._ready(shard, self._ahead, wait=False)[0])
            self._pending.discard(shard.sha256)

    def drop(self, shard: ShardEntry) -> None:
        """Forget a shard whose bytes turned out wrong, so that it is fetched again."""
        self._path(shard, "tar").unlink(missing_ok=True)

    def _ready(self, shard: ShardEntry, remote: Remote, wait: bool = True) -> tuple[int, bool]:
        """Open a shard, and say whether it had to be fetched for that; BlockingIOError if another process is at it."""
        if (descriptor := self._from_disk(shard)) is not None:
            return descriptor, False
        with locked(self._path(shard, "lock"), wait):
            if shard.sha256 in self._damaged:
                raise DamagedShard(self._damaged[shard.sha256])
            if (descriptor := self._from_disk(shard)) is not None:  # another process, or thread, was first
                return descriptor, False
            return self._fetch(shard, remote), True

    def _from_disk(self, shard: ShardEntry) -> int | None:
        path = self._path(shard, "tar")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != shard.bytes:  # cut short after it got its name
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        _used_now(descriptor)
        return descriptor

    def _fetch(self, shard: ShardEntry, remote: Remote) -> int:
        part = self._path(shard, "part")
        self._reserve(part, shard)
        try:
            digest = remote.fetch(shard.name, part, shard.bytes)
            if digest != shard.sha256:  # damaged on the way, or where it lies
                digest = remote.fetch(shard.name, part, shard.bytes)
            if digest != shard.sha256:
                where = remote.where(shard.name)
                reason = f"{where}: sha256 is {digest[:16]}…, the index lists {shard.sha256[:16]}…"
                self._damaged[shard.sha256] = reason
                raise DamagedShard(reason)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        descriptor = os.open(part, os.O_RDONLY)  # under its new name it may be removed for room at once
        _used_now(descriptor)
        os.replace(part, self._path(shard, "tar"))
        return descriptor

    def _reserve(self, part: Path, shard: ShardEntry) -> None:
        """Make room for a shard and take it, so that two processes never count the same room."""
        if shard.bytes > self.limit:
            raise InputError(
                f"data.cache_gib = {self.limit / 2**30:g}: shard {shard.name} alone has {shard.bytes / 2**30:.3g} GiB"
            )
        while True:
            with locked(self.folder / ".room.lock"):
                part.unlink(missing_ok=True)  # of a process that died
                if self._make_room(shard.bytes):
                    with open(part, "wb") as file:
                        os.posix_fallocate(file.fileno(), 0, shard.bytes)
                    return
            time.sleep(POLL)  # what others are fetching fills the cache; it can be removed when they are done

    def _make_room(self, needed: int) -> bool:
        """Remove the shards used longest ago until `needed` bytes fit; False if those being fetched leave no room."""
        found: list[tuple[int, Path, int]] = []
        for path in self.folder.iterdir():
            if not OURS.fullmatch(path.name):
                continue
            if path.suffix == ".part" and _abandoned(path.with_suffix(".lock")):
                path.unlink(missing_ok=True)
                continue
            try:
                about = path.stat()
            except FileNotFoundError:  # finished or dropped by another process just now
                continue
            found.append((about.st_mtime_ns, path, about.st_size))
        excess = sum(size for _, _, size in found) + needed - self.limit
        if excess > sum(size for _, path, size in found if path.suffix == ".tar"):
            return False
        for _, path, size in sorted(found):
            if excess > 0 and path.suffix == ".tar":
                path.unlink(missing_ok=True)
                excess -= size
        return True

    def _path(self, shard: ShardEntry, ending: str) -> Path:
        return self.folder / f"{shard.sha256}.{ending}"


def _used_now(descriptor: int) -> None:
    """Note the time of use to the nanosecond; the file system's own clock has ticks of some milliseconds."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


def _abandoned(lock: Path) -> bool:
    """Whether nobody holds a lock."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
