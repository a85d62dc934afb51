"""From positions to what a micro batch holds: which samples, read, decoded, flipped, and what is stored beside them.

It runs in the loader's workers or in the trainer's process, without torch, and holds no state that matters: what it
makes of positions is a function of seed, options and data alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megapix import outage, rng
from megapix.config import BatchLayout, DataConfig
from megapix.data import order
from megapix.data.arrays import NO_EXTRAS, Arrays, Extras, ReadTimes, padded
from megapix.data.cache import DamagedShard
from megapix.data.mix.located import Data, order_of
from megapix.data.mix.order import MixOrder
from megapix.data.mix.read import MixDecoder, MixReader, decoder_of, reader_of
from megapix.data.mix.stored import caption_reader, feature_reader, text_reader
from megapix.data.order import Positions, Skipped
from megapix.data.read import DamagedSample, Decoder, ShardReader
from megapix.errors import InputError, StorageError
from megapix.rng import Purpose
from megapix.shards.captions import choose
from megapix.shards.pixels import Pixels

AHEAD = 16
"""Micro batches whose samples are asked for before they are needed, at most."""
REPLACEMENTS = 8
"""Samples that are tried in place of a damaged one; if all are damaged too, the shards are."""

Opened: TypeAlias = tuple[ShardReader | MixReader, Decoder | MixDecoder, order.Order | MixOrder]


@dataclass(frozen=True)
class Asked:
    """The endless micro batches of a rank (`order.micro_batches`)."""

    position: int
    layout: BatchLayout
    rank: int
    skipped: Skipped
    groups: int

    def some(self, first: int, step: int) -> Iterator[Positions]:
        """Positions of every `step`-th of them, from number `first` on."""
        every = order.micro_batches(self.position, self.layout, self.rank, self.skipped, self.groups)
        return islice(every, first, None, step)


class Assembler:
    """Makes the `Arrays` of positions; the reader is opened in the process that uses it.

    Args:
        located: the data set.
        config: how it is read.
        seed: the run's seed.
        batch: positions of one step.
        extras: what is to be read too.
    """

    def __init__(self, located: Data, config: DataConfig, seed: int, batch: int, extras: Extras = NO_EXTRAS) -> None:
        self.located, self.config, self.seed, self.batch = located, config, seed, batch
        self._features = feature_reader(extras.features) if extras.features else None
        self._text = text_reader(extras.text) if extras.text else None
        self._captions = caption_reader(located) if extras.captions or extras.text else None
        self._opened: Opened | None = None

    def each(self, asked: Iterable[Positions]) -> Iterator[Arrays | InputError | StorageError]:
        """What stands at each of the positions asked for, in order, or what kept it back: exceptions are values, since
        other processes wait for them. What remote samples need is in flight while those before them are decoded."""
        source, ahead = iter(asked), deque[tuple[Positions, list[int] | InputError | StorageError]]()
        while True:
            while not ahead or (len(ahead) < AHEAD and self._room):
                if (positions := next(source, None)) is None:
                    break
                ahead.append((positions, self._begun(positions)))
            if not ahead:
                return
            positions, samples = ahead.popleft()
            try:
                yield self._arrays(positions, samples) if isinstance(samples, list) else samples
            except (InputError, StorageError) as error:
                yield error

    @property
    def _room(self) -> bool:
        return self._opened is not None and self._opened[0].room

    def _begun(self, positions: Positions) -> list[int] | InputError | StorageError:
        try:
            return self._samples(positions)
        except (InputError, StorageError) as error:  # of a batch ahead: those before it come first
            return error

    def at(self, positions: Positions) -> Arrays:
        """What stands at these positions.

        Raises:
            InputError: a sample may not be read, or it is damaged and so are those that could stand in for it.
            StorageError: it cannot be read now.
        """
        return self._arrays(positions, self._samples(positions))

    def _open(self) -> Opened:
        if self._opened is None:
            c = self.config
            outage.wait_at_most(c.outage_minutes)  # of a worker, which is a process of its own
            places = order_of(self.located, c, self.seed, self.batch)
            self._opened = reader_of(self.located, c), decoder_of(self.located), places
        return self._opened

    def _samples(self, positions: Positions) -> list[int]:
        """The samples at positions; reading them begins."""
        reader, _, places = self._open()
        samples: list[int] = places.at(positions).tolist()
        reader.begin(samples)
        return samples

    def _arrays(self, positions: Positions, samples: Sequence[int]) -> Arrays:
        reader = self._open()[0]
        mirrored = rng.uniform(self.seed, Purpose.FLIP, positions) < 0.5
        mirrored &= self.config.flip
        times, replaced, images, labels = ReadTimes(), list[str](), list[Pixels](), list[int]()
        shown = list[int]()
        for i, asked in enumerate(samples):
            sample, image, label = self._decoded(asked, int(positions[i]), replaced, times)
            images.append(image[..., ::-1] if mirrored[i] else image)
            labels.append(label)
            shown.append(sample)
        times.hits, times.misses = reader.take_hits()
        start = time.perf_counter()
        features = self._features_of(shown, mirrored.tolist())
        captions, text = self._captions_of(shown, positions)
        times.read += time.perf_counter() - start
        pixels = np.empty((len(images), *images[0].shape), np.uint8)
        np.stack(images, out=pixels)  # the one copy: of itself stack would keep the order that the decoder left
        return Arrays(pixels, np.array(labels), positions, tuple(replaced), times, features, captions, text)

    def _features_of(self, samples: list[int], mirrored: list[bool]) -> NDArray[np.generic] | None:
        """The features of the images that are shown, the replacements among them."""
        if self._features is None:
            return None
        return np.stack(list(map(self._features.read, samples, mirrored)))

    def _captions_of(
        self, samples: list[int], positions: Positions
    ) -> tuple[tuple[str, ...], tuple[NDArray[Any], ...] | None]:
        """A caption of each image that is shown, or its features: which one, by seed and position."""
        if self._captions is None:
            return (), None
        uniform = rng.uniform(self.seed, Purpose.CAPTION, positions).tolist()
        found = [self._captions.of(sample) for sample in samples]
        chosen = [choose(some, number) for some, number in zip(found, uniform, strict=True)]
        if self._text is None:
            return tuple(some[number].text for some, number in zip(found, chosen, strict=True)), None
        rows = [self._text.read(*which) for which in zip(samples, chosen, strict=True)]
        return (), padded(rows, self._text.features.recipe.attended)

    def _decoded(self, sample: int, position: int, replaced: list[str], times: ReadTimes) -> tuple[int, Pixels, int]:
        """The sample with image and label, or if it is damaged another one of its bucket: which, depends on seed and
        position alone."""
        try:
            return sample, *self._image(sample, times)
        except DamagedSample as error:
            damaged: InputError = error
        except DamagedShard as error:
            if self.config.corrupt_shard == "stop":
                raise InputError(f"{error}; data.corrupt_shard = 'replace' replaces its samples") from error
            damaged = error
        replaced.append(str(damaged))
        first, count = self._open()[2].among(sample)
        tries = np.arange(REPLACEMENTS) + REPLACEMENTS * position
        for other in (rng.bits(self.seed, Purpose.REPLACEMENT, tries) % np.uint64(count)).tolist():
            try:
                return first + other, *self._image(first + other, times)
            except (DamagedSample, DamagedShard):
                continue
        raise damaged

    def _image(self, sample: int, times: ReadTimes) -> tuple[Pixels, int]:
        reader, decoder, _ = self._open()
        start = time.perf_counter()
        try:
            encoded = reader.read(sample)
            times.read -= start - (start := time.perf_counter())
            return decoder.of(sample)(encoded.data, encoded.bucket), encoded.label
        except ValueError as error:
            raise DamagedSample(f"{reader.where(sample)}: {error}") from error
        finally:
            times.decode += time.perf_counter() - start
