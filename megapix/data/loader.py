"""Micro batches for one rank: each stage of `megapix.data` put together, in worker processes.

`MicroBatches` maps positions to a `Batch` and holds no state that matters; `batches` has torch's DataLoader run it over
this rank's positions and hands the results over in order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megapix import outage, rng
from megapix.config import BatchLayout, DataConfig
from megapix.data import order, workers
from megapix.data.batch import NO_EXTRAS, Batch, Extras, ReadTimes, padded
from megapix.data.cache import DamagedShard
from megapix.data.mix.located import Data, order_of
from megapix.data.mix.order import MixOrder
from megapix.data.mix.read import MixDecoder, MixReader, decoder_of, reader_of
from megapix.data.mix.stored import caption_reader, feature_reader, text_reader
from megapix.data.order import Positions, Skipped
from megapix.data.read import DamagedSample, Decoder, ShardReader
from megapix.dist import warn
from megapix.errors import InputError, RankLost, StorageError
from megapix.rng import Purpose
from megapix.shards.captions import choose
from megapix.shards.pixels import Pixels

PREFETCH = 4
"""Micro batches that each worker keeps ready."""
AHEAD = 16
"""Steps by which shards are fetched into the cache before they are needed."""
RESTARTS = 3
"""How often in a row killed workers are started again."""
REPLACEMENTS = 8
"""Samples that are tried in place of a damaged one; if all are damaged too, the shards are."""


Opened: TypeAlias = tuple[ShardReader | MixReader, Decoder | MixDecoder, order.Order | MixOrder]


class MicroBatches(Dataset[Batch]):
    """Maps an array of positions to its `Batch`; the reader is opened in the process that uses it.

    Args:
        located: the data set.
        config: how it is read.
        seed: the run's seed.
        batch: positions of one step.
        extras: what is to be read and drawn too.
    """

    def __init__(self, located: Data, config: DataConfig, seed: int, batch: int, extras: Extras = NO_EXTRAS) -> None:
        self.located, self.config, self.seed, self.batch = located, config, seed, batch
        self._draw = extras.draw
        self._features = feature_reader(extras.features) if extras.features else None
        self._text = text_reader(extras.text) if extras.text else None
        self._captions = caption_reader(located) if extras.captions or extras.text else None
        self._opened: Opened | None = None

    def __getitem__(self, positions: Positions) -> Batch | InputError | StorageError:  # type: ignore[override]
        """The micro batch, or what kept it back: an exception would reach the trainer wrapped in a traceback."""
        try:
            return self._batch(positions)
        except (InputError, StorageError) as error:
            return error

    def _open(self) -> Opened:
        if self._opened is None:
            c = self.config
            outage.wait_at_most(c.outage_minutes)  # of a worker, which is a process of its own
            places = order_of(self.located, c, self.seed, self.batch)
            self._opened = reader_of(self.located, c), decoder_of(self.located), places
        return self._opened

    def _batch(self, positions: Positions) -> Batch:
        reader, _, places = self._open()
        mirrored = rng.uniform(self.seed, Purpose.FLIP, positions) < 0.5
        mirrored &= self.config.flip
        times, replaced, images, labels = ReadTimes(), list[str](), list[Pixels](), list[int]()
        shown = list[int]()
        for i, asked in enumerate(places.at(positions).tolist()):
            sample, image, label = self._decoded(asked, int(positions[i]), replaced, times)
            images.append(image[..., ::-1] if mirrored[i] else image)
            labels.append(label)
            shown.append(sample)
        ahead = positions + AHEAD * self.batch
        if places.end is None or ahead.max() < places.end:
            reader.prefetch(places.at(ahead).tolist())
        times.hits, times.misses = reader.take_hits()
        start = time.perf_counter()
        features = self._features_of(shown, mirrored.tolist())
        captions, text = self._captions_of(shown, positions)
        times.read += time.perf_counter() - start
        pixels = torch.from_numpy(np.stack(images))
        draws = self._draw(positions) if self._draw else ()
        return Batch(pixels, torch.tensor(labels), positions, tuple(replaced), times, features, captions, text, draws)

    def _features_of(self, samples: list[int], mirrored: list[bool]) -> Tensor | None:
        """The features of the images that are shown, the replacements among them."""
        if self._features is None:
            return None
        stacked = torch.from_numpy(np.stack(list(map(self._features.read, samples, mirrored))))
        return stacked.view(torch.bfloat16) if self._features.features.dtype == "bf16" else stacked

    def _captions_of(
        self, samples: list[int], positions: Positions
    ) -> tuple[tuple[str, ...], tuple[Tensor, ...] | None]:
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


def batches(
    config: DataConfig,
    located: Data,
    seed: int,
    layout: BatchLayout,
    rank: int,
    position: int,
    skipped: Skipped,
    extras: Extras = NO_EXTRAS,
) -> Generator[Batch, None, None]:
    """Endless micro batches of `rank` from `position` on, with what is read beside them; closing it ends the workers.

    Raises:
        InputError: more damaged samples than `max_replaced`, or one without a replacement; names shard and key. Or
            features that cannot be read.
        RankLost: the workers are killed again and again.
        StorageError: a sample, or what is read beside it, cannot be read now.
    """
    asked = _Asked(order.micro_batches(position, layout, rank, skipped, config.reading_groups))
    loader = DataLoader(
        MicroBatches(located, config, seed, layout.total, extras),
        batch_size=None,
        sampler=asked,
        num_workers=config.workers,
        worker_init_fn=partial(workers.begin, workers.WAITED) if config.workers else None,
        prefetch_factor=PREFETCH if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=workers.context() if config.workers else None,
    )
    replaced = 0
    for batch in _in_spite_of_kills(loader, asked, rank):
        if isinstance(batch, (InputError, StorageError)):
            raise batch
        replaced += len(batch.replaced)
        if replaced > config.max_replaced:
            raise InputError(
                f"{batch.replaced[-1]} (damaged sample number {replaced}, data.max_replaced allows "
                f"{config.max_replaced} on each rank)"
            )
        yield batch


class _Asked(Iterable[Positions]):
    """Positions for a loader, which asks for them ahead; begun anew, those of batches that never came are first."""

    def __init__(self, source: Iterator[Positions]) -> None:
        self._source, self._open = source, deque[Positions]()

    def __iter__(self) -> Iterator[Positions]:
        yield from list(self._open)
        for positions in self._source:
            self._open.append(positions)
            yield positions

    def received(self) -> None:
        """The next batch, in order, has come."""
        self._open.popleft()


def _in_spite_of_kills(loader: DataLoader[Any], asked: _Asked, rank: int) -> Generator[Any, None, None]:
    """The loader's batches. If a worker is killed, all are started again for the batches that have not come: what they
    make is a function of positions alone.

    Raises:
        RankLost: without a batch in between they have been killed more than RESTARTS times.
    """
    restarts = 0
    while True:
        each: Any = iter(loader)
        workers.end_at_exit()
        try:
            while True:
                batch = next(each)
                asked.received()
                restarts = 0
                yield batch
        except Exception as error:
            processes = getattr(each, "_workers", [])
            ends = workers.killed(processes)
            if not ends:
                raise
            for process in processes:
                process.kill()  # they do not see the signal that torch would end them with
            restarts += 1
            if restarts > RESTARTS:
                raise RankLost(
                    f"the data workers of rank {rank} are lost, {restarts} times in a row: {ends}"
                ) from error
            warn(f"rank {rank}: data {ends}; its workers start again ({restarts} of {RESTARTS} in a row)")
