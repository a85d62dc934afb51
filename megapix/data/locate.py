"""Where a data set lies: its index in a local folder, its tar files in a folder or below a URL."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megapix.config import DataConfig
from megapix.errors import InputError
from megapix.files import sha256_of, size_of, write_atomic
from megapix.outage import error_of
from megapix.shards.image_policy import Policy
from megapix.shards.index import INDEX_NAME, TABLE_NAME, TAR_BLOCK, Index, missing_shards, read_index, version_name
from megapix.shards.storage import QUERY, Access, Refused, Remote, is_url, shown
from megapix.shards.table import Table, check_table, hashes


@dataclass(frozen=True)
class Located:
    """An index and the places of its files."""

    index: Index
    folder: Path
    """Local folder with index.json, samples.bin and captions.bin."""
    base: str
    """Folder or URL of the tar files."""
    faults: tuple[str, ...] = ()
    """Local tar files that are missing or of another size, which `data.corrupt_shard` lets pass."""
    newer: str = ""
    """Digest of the newest index, where this is an older version of it."""

    @property
    def remote(self) -> bool:
        """Whether the tar files lie below a URL."""
        return is_url(self.base)


def access_of(config: DataConfig) -> Access:
    """How patient remote reads are."""
    return Access(config.timeout, config.outage_minutes)


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
    """Find and check the index of `data.path`; an index below a URL is copied into the cache folder first.

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
        folder = _mirrored(config)
    index = read_index(folder, config.image_size)
    check_table(folder, index)
    _check_records(folder, index)
    base = index.tars_at(config.path)
    if is_url(base):
        return Located(index, folder, base)
    faults = missing_shards(Path(base), index)
    if faults and config.corrupt_shard == "stop":
        raise InputError(faults[0])
    return Located(index, folder, base, tuple(faults))


def _check_records(folder: Path, index: Index) -> None:
    """Check that every record points into its shard and at a class that there is, and the image policy."""
    table = Table(folder, index).columns
    entry = np.repeat(np.arange(len(index.shards)), [shard.samples for shard in index.shards])
    ends = np.array([shard.bytes for shard in index.shards], np.uint64)[entry]
    # Offsets are unsigned: they are compared by what is left of the shard, so that no sum can wrap around.
    offsets, sizes = table["offset"], table["size"].astype(np.uint64)
    wrong = table["shard"] != entry
    wrong |= (offsets < TAR_BLOCK) | (offsets > ends) | (sizes > ends - np.minimum(offsets, ends))
    wrong |= (table["label"] < 0) | (table["label"] >= len(index.classes))
    if wrong.any():
        raise InputError(
            f"{folder / TABLE_NAME}: record {int(wrong.argmax())} points outside its shard or at no class; "
            "prepare the folder again"
        )
    Policy.from_dict(index.image_policy)


def _mirrored(config: DataConfig) -> Path:
    """The local copy of a remote index, table and captions; several processes may make it at the same time."""
    remote = Remote(config.path, access_of(config))
    data = remote.read(INDEX_NAME, 0, remote.size(INDEX_NAME))
    folder = Path(config.cache) / f"index-{hashlib.sha256(data).hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / INDEX_NAME, data)
        index = read_index(folder)
        for name, sha256 in hashes(index).items():
            path = folder / name
            if size_of(path) is None or sha256_of(path) != sha256:
                write_atomic(path, remote.read(name, 0, remote.size(name)))
    except OSError as error:
        raise error_of(error, f"data.cache = {config.cache!r}: {error.strerror or error}") from error
    return folder
