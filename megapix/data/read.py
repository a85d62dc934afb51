"""Random access to the images of an index: one read a sample, checked against its CRC."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from megapix.config import DataConfig
from megapix.data.cache import CachedShards, DamagedShard
from megapix.data.locate import Located, access_of
from megapix.data.table import open_table
from megapix.errors import InputError
from megapix.shards import TAR_BLOCK, SampleRecord, ShardEntry
from megapix.storage import Local, Remote


class DamagedSample(InputError):
    """The bytes of one sample are not what the index says, or not an image."""


@dataclass(frozen=True)
class Encoded:
    """One sample as it lies in its shard."""

    data: bytes
    """The encoded image."""
    label: int
    bucket: int


class ShardReader:
    """Reads the encoded image and label of any sample; each process needs its own."""

    def __init__(self, located: Located, config: DataConfig) -> None:
        self.located, self.config = located, config
        self.table = open_table(located.folder, located.index)
        self.cache: CachedShards | None = None
        self._files: Local | Remote = Local(Path(located.base))
        if located.remote:
            self._files = Remote(located.base, access_of(config))
            if config.cache and config.cache_gib:
                self.cache = CachedShards(self._files, Path(config.cache), int(config.cache_gib * 2**30))

    def read(self, sample: int) -> Encoded:
        """The sample's bytes, label and bucket.

        Raises:
            DamagedSample: they are not what the index says. DamagedShard: its whole tar file is not.
            InputError: it cannot be read now.
        """
        record, shard = self._record(sample)
        data = self._bytes(shard, record.offset, record.size)
        if zlib.crc32(data) != record.crc and self.cache:  # of the local copy, perhaps
            self.cache.drop(shard)
            data = self._bytes(shard, record.offset, record.size)
        if zlib.crc32(data) != record.crc:
            raise DamagedSample(
                f"{self.where(sample)}: its {record.size} bytes at byte {record.offset} are not those that were indexed"
            )
        return Encoded(data, record.label, shard.bucket)

    def shard_of(self, sample: int) -> ShardEntry:
        """The entry that holds a sample."""
        return self._record(sample)[1]

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        record, shard = self._record(sample)
        try:
            header = self._bytes(shard, record.offset - TAR_BLOCK, TAR_BLOCK)
            key = header[:100].rstrip(b"\0").decode("ascii", "replace").partition(".")[0]
        except InputError:
            key = ""
        return f"{self._files.where(shard.name)}: sample {sample}" + (f" (key {key})" if key else "")

    def _record(self, sample: int) -> tuple[SampleRecord, ShardEntry]:
        record = SampleRecord(*self.table[sample].tolist())
        return record, self.located.index.shards[record.shard]

    def _bytes(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        if self.cache:
            return self.cache.read(shard, offset, size)
        try:
            return self._files.read(shard.name, offset, size)
        except FileNotFoundError as error:
            raise DamagedShard(f"{self._files.where(shard.name)} is missing") from error
        except OSError as error:  # of this machine: says nothing about the shard
            raise InputError(f"{self._files.where(shard.name)}: cannot be read: {error.strerror or error}") from error
