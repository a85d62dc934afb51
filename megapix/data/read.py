"""Random access to the samples of an index: encoded images, their pixels, and first captions.

Shards may come from strangers. The stock webdataset decoders would unpickle `.pyd` and `.pth` members and decode an
image of any size; here nothing but the indexed image is read, checked against its CRC, and its size is known before its
pixels are decoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from megapix.config import DataConfig
from megapix.data.cache import CachedShards, DamagedShard
from megapix.data.locate import Located
from megapix.data.mirror import access_of
from megapix.errors import InputError, StorageError
from megapix.shards.image_policy import Policy, decode_indexed
from megapix.shards.index import TAR_BLOCK, Index, ShardEntry
from megapix.shards.pixels import Pixels
from megapix.shards.storage import Local, Remote
from megapix.shards.storage.ranges import Ranges
from megapix.shards.table import Captions, SampleRecord, Table


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
        self.table = Table(located.folder, located.index)
        self.cache: CachedShards | None = None
        self._files: Local | Remote = Local(Path(located.base))
        self._ranges: Ranges | None = None
        self._begun: dict[int, tuple[SampleRecord, ShardEntry]] = {}
        """Where samples lie that are asked for ahead."""
        if located.remote:
            self._files = Remote(located.base, access_of(config))
            if config.cache and config.cache_gib:
                self.cache = CachedShards(self._files, Path(config.cache), int(config.cache_gib * 2**30))
            else:
                self._ranges = Ranges(self._files)

    @property
    def room(self) -> bool:
        """Whether more samples may be asked for before they are needed; of local files none need be."""
        return self.cache is not None or (self._ranges is not None and self._ranges.room)

    def begin(self, samples: Sequence[int]) -> None:
        """Begin to fetch what these samples lie in, without waiting, where that is remote."""
        if not self.located.remote:
            return
        found = [self._record(sample) for sample in samples]
        if self.cache:
            self.cache.prefetch(shard for _, shard in found)
        elif self._ranges:
            self._ranges.begin([(shard.name, record.offset, record.size) for record, shard in found])
        self._begun.update(zip(samples, found, strict=True))

    def read(self, sample: int) -> Encoded:
        """The sample's bytes, label and bucket.

        Raises:
            DamagedSample: they are not what the index says. DamagedShard: its whole tar file is not.
            StorageError: they cannot be read now. InputError: they may not be read.
        """
        record, shard = self._begun.pop(sample) if sample in self._begun else self._record(sample)
        data = self._bytes(shard, record.offset, record.size)
        if zlib.crc32(data) != record.crc and self.cache:  # of the local copy, perhaps
            self.cache.drop(shard)
            data = self._bytes(shard, record.offset, record.size)
        if zlib.crc32(data) != record.crc:
            raise DamagedSample(
                f"{self.where(sample)}: its {record.size} bytes at byte {record.offset} are not those that were indexed"
            )
        return Encoded(data, record.label, shard.bucket)

    def take_hits(self) -> tuple[int, int]:
        """Reads since the last call that the cache answered, and that it did not."""
        if self.cache is None:
            return 0, 0
        counts = self.cache.hits, self.cache.misses
        self.cache.hits = self.cache.misses = 0
        return counts

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        record, shard = self._record(sample)
        try:
            header = self._bytes(shard, record.offset - TAR_BLOCK, TAR_BLOCK)
            key = header[:100].rstrip(b"\0").decode("ascii", "replace").partition(".")[0]
        except (InputError, StorageError):
            key = ""
        return f"{self._files.where(shard.name)}: sample {sample}" + (f" (key {key})" if key else "")

    def _record(self, sample: int) -> tuple[SampleRecord, ShardEntry]:
        record = self.table[sample]
        return record, self.located.index.shards[record.shard]

    def _bytes(self, shard: ShardEntry, offset: int, size: int) -> bytes:
        if self.cache:
            return self.cache.read(shard, offset, size)
        try:
            return (self._ranges or self._files).read(shard.name, offset, size)
        except FileNotFoundError as error:
            raise DamagedShard(f"{self._files.where(shard.name)} is missing") from error
        except OSError as error:  # of this machine: says nothing about the shard
            raise InputError(f"{self._files.where(shard.name)}: cannot be read: {error.strerror or error}") from error


class Decoder:
    """Decodes the images of one index."""

    def __init__(self, index: Index) -> None:
        self.policy = Policy.from_dict(index.image_policy)
        self._prepared = index.prepared

    def of(self, _sample: int) -> Decoder:
        """That of a sample."""
        return self

    def __call__(self, data: bytes, bucket: int) -> Pixels:
        """The image: a view, uint8 [3, H, W], of its bucket's size.

        Raises:
            ValueError: not an image, damaged, of another size than prepared ones have, or refused by the policy.
        """
        return decode_indexed(data, self.policy, bucket, self._prepared).transpose(2, 0, 1)


class FirstCaptions(Sequence[str]):
    """The first caption of every sample of an index, read when it is asked for; arguments and errors of `Captions`."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._captions, self._samples = Captions(folder, index), index.samples

    def __len__(self) -> int:
        return self._samples

    @overload
    def __getitem__(self, sample: int) -> str: ...
    @overload
    def __getitem__(self, sample: slice) -> tuple[str, ...]: ...
    def __getitem__(self, sample: int | slice) -> str | tuple[str, ...]:
        found = range(self._samples)[sample]
        return self._captions.of(found)[0].text if isinstance(found, int) else tuple(self[n] for n in found)
