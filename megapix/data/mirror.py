"""The local copy of a remote index, for all processes of a node: CACHE/index-HASH.

The tables are fetched once, by the process that holds the lock; the others wait for them. They are streamed to disk in
parts, so memory does not grow with them, and a fetch that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from megapix.config import DataConfig
from megapix.errors import InputError
from megapix.files import locked, size_of, write_atomic
from megapix.outage import error_of
from megapix.shards.index import INDEX_NAME, as_sha256, read_index
from megapix.shards.storage import PART, Access, Remote
from megapix.shards.table import hashes
from megapix.shards.tables.entries import SHARDS_NAME
from megapix.shards.tables.stamps import RACY

IN_FLIGHT = 192
"""Requests of a rank in flight together, shared among its workers; each has 16 at least."""


def access_of(config: DataConfig) -> Access:
    """How patient remote reads are, and how many are in flight."""
    return Access(config.timeout, config.outage_minutes, in_flight=max(16, IN_FLIGHT // max(1, config.workers)))


def mirrored(config: DataConfig, tables: tuple[str, ...], again: bool = False) -> Path:
    """The folder of the local copy of the index at `data.path`, with those of its tables.

    Args:
        again: fetch them though they are there.

    Raises:
        StorageError: the server is away. InputError: it has no such index or not its tables, or the cache cannot be
            written.
    """
    remote = Remote(config.path, access_of(config))
    data = remote.read(INDEX_NAME, 0, remote.size(INDEX_NAME))
    folder = Path(config.cache) / f"index-{hashlib.sha256(data).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            write_atomic(folder / INDEX_NAME, data)
            _fetch(remote, folder, _entries(data), again)
            wanted = {name: sha256 for name, sha256 in hashes(read_index(folder)).items() if name in tables}
            _fetch(remote, folder, wanted, again)
    except OSError as error:
        raise error_of(error, f"data.cache = {config.cache!r}: {error.strerror or error}") from error
    return folder


def _entries(data: bytes) -> dict[str, str]:
    """Name and hash of the table without which the index cannot be read; what is wrong with it, `read_index` says."""
    try:
        return {SHARDS_NAME: as_sha256(json.loads(data)["shards"]["sha256"])}
    except (ValueError, TypeError, KeyError):
        return {}


def _fetch(remote: Remote, folder: Path, tables: dict[str, str], again: bool) -> None:
    for name, sha256 in tables.items():
        if not again and size_of(folder / name) is not None:
            continue
        size = remote.size(name)
        if (found := _streamed(remote, name, folder, size)) != sha256:  # damaged on the way, or of a part of another
            found = _streamed(remote, name, folder, size)
        if found != sha256:
            raise InputError(
                f"{remote.where(name)} has sha256 {found[:16]}…, but {INDEX_NAME} lists {sha256[:16]}…: the index does "
                "not match its shards; prepare the folder again"
            )
        part = folder / f"{name}.part"
        old = time.time() - 2 * RACY  # so that what is stamped next is known by its time
        os.utime(part, (old, old))
        os.replace(part, folder / name)


def _streamed(remote: Remote, name: str, folder: Path, size: int) -> str:
    """Fetch what is missing of `NAME.part`, sync it, and return its SHA-256; a whole one is fetched anew."""
    digest = hashlib.sha256()
    with open(folder / f"{name}.part", "a+b") as file:
        if file.tell() >= size:
            file.truncate(0)
        file.seek(0)
        while block := file.read(PART):
            digest.update(block)
        for offset in range(file.tell(), size, PART):
            data = remote.read(name, offset, min(PART, size - offset))
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
