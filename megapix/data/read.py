"""Random access to the images of an index: one read a sample, checked against its CRC."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapix.config import DataConfig
from megapix.data.cache import CachedShards, DamagedShard
from megapix.data.locate import Located, access_of
from megapix.errors import InputError
from megapix.shards import CAPTIONS_NAME, RECORD, TABLE_NAME, TAR_BLOCK, SampleRecord, ShardEntry
from megapix.storage import Local, Remote

RECORD_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("size", "<u4"),
        ("offset", "<u8"),
        ("label", "<i4"),
        ("crc", "<u4"),
        ("caption_offset", "<u8"),
        ("caption_size", "<u4"),
    ]
)
assert RECORD_DTYPE.itemsize == RECORD.size


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
    """Reads the encoded image, label and caption of any sample; each process needs its own."""

    def __init__(self, located: Located, config: DataConfig) -> None:
        self.located, self.config = located, config
        samples = located.index.samples
        self.table = np.memmap(located.folder / TABLE_NAME, dtype=RECORD_DTYPE, mode="r", shape=(samples,))
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

    def caption(self, sample: int) -> str:
        """The sample's caption."""
        record, _ = self._record(sample)
        with open(self.located.folder / CAPTIONS_NAME, "rb") as file:
            file.seek(record.caption_offset)
            return file.read(record.caption_size).decode()

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
        except OSError as error:
            raise DamagedShard(f"{self._files.where(shard.name)}: cannot be read: {error.strerror or error}") from error
