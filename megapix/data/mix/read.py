"""Reading images of a run's data by sample number: of one set, or of each set of a mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megapix.config import DataConfig
from megapix.data.locate import Located
from megapix.data.mix.located import Data, LocatedMix
from megapix.data.read import Decoder, Encoded, ShardReader


class MixReader:
    """As `ShardReader`, of all sets; labels are those of the mix."""

    def __init__(self, mix: LocatedMix, config: DataConfig) -> None:
        self._mix = mix
        self._parts = [ShardReader(one, config) for one in mix.sets]

    def read(self, sample: int) -> Encoded:
        """The sample's bytes, label and bucket; errors as of `ShardReader`."""
        number, inside = self._mix.place(sample)
        found = self._parts[number].read(inside)
        return replace(found, label=self._mix.labels[number][found.label])

    def where(self, sample: int) -> str:
        """Shard and key of a sample, for messages."""
        number, inside = self._mix.place(sample)
        return self._parts[number].where(inside)

    @property
    def room(self) -> bool:
        """Whether more samples may be asked for before they are needed, as of `ShardReader`."""
        rooms = [part.room for part in self._parts if part.located.remote]
        return bool(rooms) and all(rooms)

    def begin(self, samples: Sequence[int]) -> None:
        """Begin to fetch what these samples lie in, without waiting, where that is remote."""
        by_set: dict[int, list[int]] = {}
        for sample in samples:
            number, inside = self._mix.place(sample)
            by_set.setdefault(number, []).append(inside)
        for number, some in by_set.items():
            self._parts[number].begin(some)

    def take_hits(self) -> tuple[int, int]:
        """Reads since the last call that the cache answered, and that it did not."""
        counts = [part.take_hits() for part in self._parts]
        return sum(hits for hits, _ in counts), sum(misses for _, misses in counts)


class MixDecoder:
    """As `Decoder`, for samples of all sets."""

    def __init__(self, mix: LocatedMix) -> None:
        self._mix, self._parts = mix, [Decoder(one.index) for one in mix.sets]

    def of(self, sample: int) -> Decoder:
        """That of a sample's set: images of some may be as they are wanted, those of others not."""
        return self._parts[self._mix.place(sample)[0]]


def reader_of(data: Data, config: DataConfig) -> ShardReader | MixReader:
    """Reads any sample; each process needs its own."""
    return ShardReader(data, config) if isinstance(data, Located) else MixReader(data, config)


def decoder_of(data: Data) -> Decoder | MixDecoder:
    """Decodes any sample."""
    return Decoder(data.index) if isinstance(data, Located) else MixDecoder(data)
