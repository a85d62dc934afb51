"""Where a data set lies: its index in a local folder, its tar files in a folder or below a URL."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from megapix.config import DataConfig
from megapix.data.mirror import mirrored
from megapix.errors import InputError
from megapix.files import size_of
from megapix.shards.image_policy import Policy
from megapix.shards.index import (
    CAPTIONS_NAME,
    INDEX_NAME,
    TABLE_NAME,
    Index,
    missing_shards,
    read_index,
    version_name,
)
from megapix.shards.storage import QUERY, Refused, is_url, shown
from megapix.shards.table import check_table
from megapix.shards.tables.entries import SHARDS_NAME
from megapix.shards.tables.stamps import State, once, state_of

TABLES = (SHARDS_NAME, TABLE_NAME)
"""Tables of an index that every run reads."""
MANY = 2_000
"""Tar files whose sizes are looked at whenever a run starts: in a tenth of a second on a local disk."""


@dataclass(frozen=True)
class Located:
    """An index and the places of its files."""

    index: Index
    folder: Path
    """Local folder with index.json and its tables."""
    base: str
    """Folder or URL of the tar files."""
    faults: tuple[str, ...] = ()
    """Local tar files that are missing or of another size, which `data.corrupt_shard` lets pass."""
    newer: str = ""
    """Digest of the newest index, where this is an older version of it."""
    place: str = ""
    """Folder or URL where the index lies."""

    @property
    def remote(self) -> bool:
        """Whether the tar files lie below a URL."""
        return is_url(self.base)


def locate_version(config: DataConfig, digest: str) -> Located:
    """As `locate`, but where the set has grown, the older index with that digest, if it is kept there."""
    newest = locate(config)
    if newest.index.digest == digest:
        return newest
    kept = f"{config.path.rstrip('/')}/{version_name(digest)}"
    try:
        if not is_url(kept) and size_of(Path(kept) / INDEX_NAME) is None:
            return newest
        return replace(locate(replace(config, path=kept)), newer=newest.index.digest)
    except Refused:  # the server has no such version
        return newest


def locate(config: DataConfig) -> Located:
    """Find and check the index of `data.path`; an index below a URL is copied into the cache folder first. Its captions
    are neither copied nor checked before `have_captions` asks for them.

    The sizes of local tar files are compared with the index. Remote ones are checked when they are read: a whole shard
    by its hash, a range by the sample's CRC.

    Raises:
        InputError: no index there, damaged, of another version, or not that of its tar files.
    """
    folder = Path(config.path)
    if is_url(config.path):
        if "?" in config.path:
            raise InputError(f"data.path = {shown(config.path)!r}: a URL's query would be recorded; set it in {QUERY}")
        if not config.cache:
            raise InputError(f"data.path = {config.path!r} is remote: give a local folder for its index, --data.cache")
        folder = mirrored(config, TABLES)
    index = read_index(folder, config.image_size)
    try:
        check_table(folder, index, captions=False, records=True)
    except InputError:
        if not is_url(config.path):
            raise
        mirrored(config, TABLES, again=True)  # the copy was damaged, perhaps
        check_table(folder, index, captions=False, records=True)
    Policy.from_dict(index.image_policy)
    base = index.tars_at(config.path)
    if is_url(base):
        return Located(index, folder, base, place=config.path)
    faults = _tar_faults(folder, Path(base), index)
    if faults and config.corrupt_shard == "stop":
        raise InputError(faults[0])
    return Located(index, folder, base, tuple(faults), place=config.path)


def _tar_faults(folder: Path, base: Path, index: Index) -> list[str]:
    """What is wrong with local tar files by their sizes. Many are looked at once on a node, and again where a file has
    come to one of their folders or gone; one that shrinks in its place is found when it is read."""
    if len(index.files) <= MANY:
        return missing_shards(base, index)
    faults: list[str] = []

    def check() -> State:
        folders = {base / os.path.dirname(file.name) for file in index.files}
        before = state_of(sorted(place for place in folders if place.is_dir()))
        faults.extend(missing_shards(base, index))
        if faults:
            raise InputError(faults[0])
        return before

    try:
        once(folder, f"tar files in {base}: {index.identity}", check)
    except InputError:
        if not faults:
            raise
    return faults


def have_captions(located: Located, config: DataConfig) -> None:
    """Copy the captions of a remote index, and check those of any, once on a node.

    Raises:
        InputError: they are missing, or not those of the index. StorageError: they cannot be read now.
    """
    if is_url(located.place):
        mirrored(replace(config, path=located.place), (CAPTIONS_NAME,))
    check_table(located.folder, located.index)
