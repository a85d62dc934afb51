"""Micro batches for one rank, in the order of `order.py`: positions -> read -> decode -> flip -> `Batch`.

Stage by stage, in worker processes (or, with workers = 0, in the training process):

    order.micro_batches   positions of this rank's next micro batches, from the run's position on
    order.Order           position -> sample number, by the epoch's permutation
    read.ShardReader      sample number -> encoded image and label, one read, its CRC checked
    decode.Decoder        -> uint8 image [3, H, W]; another sample's, by (seed, position), if this one is damaged
    flip                  mirrored where (seed, position) says so
    FeatureReader         sample number, mirrored or not -> REPA's features, where they were computed before
    captions.choose       a caption of the sample, by (seed, position), or its features (TextFeatureReader)

Resume contract: `batches(..., position=p)` yields exactly what a loader started at 0 yields after p positions, for any
number of ranks and workers and any micro batch. Workers hold no state that matters; torch's DataLoader hands their
results over in order.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megapix import captions, draws
from megapix.config import BatchLayout, DataConfig
from megapix.data import order, workers
from megapix.data.cache import DamagedShard
from megapix.data.captions import Captions
from megapix.data.decode import Decoder
from megapix.data.locate import Located
from megapix.data.order import Positions, Skipped
from megapix.data.read import DamagedSample, ShardReader
from megapix.draws import Purpose
from megapix.errors import InputError
from megapix.features import FeatureReader, Features
from megapix.images import Pixels
from megapix.text_features import TextFeatureReader, TextFeatures

PREFETCH = 4
"""Micro batches that each worker keeps ready."""
AHEAD = 16
"""Steps by which shards are fetched into the cache before they are needed."""
REPLACEMENTS = 8
"""Samples that are tried in place of a damaged one; if all are damaged too, the shards are."""


@dataclass
class Spent:
    """What a micro batch cost its worker."""

    read: float = 0.0
    """Seconds spent reading."""
    decode: float = 0.0
    """Seconds spent decoding."""
    hits: int = 0
    """Reads that found their shard in the cache."""
    misses: int = 0
    """Reads that had to fetch it."""

    def add(self, other: Spent) -> None:
        """Add another's."""
        self.read += other.read
        self.decode += other.decode
        self.hits += other.hits
        self.misses += other.misses

    def row(self, images: int) -> dict[str, float]:
        """Scalars: milliseconds of a worker for an image, and the share of reads that the cache answered."""
        row = {"data/read_ms": 1e3 * self.read / images, "data/decode_ms": 1e3 * self.decode / images}
        if reads := self.hits + self.misses:
            row["data/cache_hit_share"] = self.hits / reads
        return row


@dataclass
class Batch:
    """One micro batch of one rank."""

    images: Tensor
    """uint8 [B, 3, H, W]."""
    labels: Tensor
    """int64 [B]."""
    positions: Positions
    """int64 [B]: the samples' positions in the run."""
    replaced: tuple[str, ...] = ()
    """What was wrong with each sample that another one stands in for."""
    spent: Spent = field(default_factory=Spent)
    features: Tensor | None = None
    """An encoder's features of the images, where the run reads them: bf16 or float32 [B, rows, columns, F]."""
    captions: tuple[str, ...] = ()
    """One caption of each image, where the run reads them."""
    text: tuple[Tensor, Tensor] | None = None
    """Or its features, bf16 [B, T, C_text], and their mask, bool [B, T]; T is the longest of the batch."""

    def pin_memory(self) -> Batch:
        """Page-locked copies, so that the transfer to a GPU does not wait (called by DataLoader)."""
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        features = None if self.features is None else self.features.pin_memory()
        text = None if self.text is None else (self.text[0].pin_memory(), self.text[1].pin_memory())
        return replace(self, images=images, labels=labels, features=features, text=text)


@dataclass(frozen=True)
class Beside:
    """What is read beside images and labels."""

    features: Features | None = None
    """An image encoder's features, for REPA."""
    captions: bool = False
    """One caption of each image, by seed and position."""
    text: TextFeatures | None = None
    """A text encoder's features of that caption."""


class MicroBatches(Dataset[Batch]):
    """Maps an array of positions to its `Batch`; the reader is opened in the process that uses it.

    Args:
        located: the data set.
        config: how it is read.
        seed: the run's seed.
        batch: positions of one step.
        beside: what is to be read too.
    """

    def __init__(self, located: Located, config: DataConfig, seed: int, batch: int, beside: Beside = Beside()) -> None:
        self.located, self.config, self.seed, self.batch = located, config, seed, batch
        self._features = FeatureReader(beside.features) if beside.features else None
        self._text = TextFeatureReader(beside.text) if beside.text else None
        self._captions = Captions(located.folder, located.index) if beside.captions or beside.text else None
        self._opened: tuple[ShardReader, Decoder, order.Order] | None = None

    def __getitem__(self, positions: Positions) -> Batch | InputError:  # type: ignore[override]
        """The micro batch, or the InputError: an exception would reach the trainer wrapped in a traceback."""
        try:
            return self._batch(positions)
        except InputError as error:
            return error

    def _open(self) -> tuple[ShardReader, Decoder, order.Order]:
        if self._opened is None:
            c, index = self.config, self.located.index
            places = order.Order(self.seed, index.shards, c.shuffle_window, c.reading_groups, self.batch)
            self._opened = ShardReader(self.located, c), Decoder(index), places
        return self._opened

    def _batch(self, positions: Positions) -> Batch:
        reader, _, places = self._open()
        mirrored = draws.uniform(self.seed, Purpose.FLIP, positions) < 0.5
        mirrored &= self.config.flip
        spent, replaced, images, labels = Spent(), list[str](), list[Pixels](), list[int]()
        shown = list[int]()
        for i, asked in enumerate(places.at(positions).tolist()):
            sample, image, label = self._decoded(asked, int(positions[i]), replaced, spent)
            images.append(image[..., ::-1] if mirrored[i] else image)
            labels.append(label)
            shown.append(sample)
        if reader.cache:
            ahead = places.at(positions + AHEAD * self.batch)
            reader.cache.prefetch(reader.shard_of(sample) for sample in ahead.tolist())
            spent.hits, spent.misses = reader.cache.hits, reader.cache.misses
            reader.cache.hits = reader.cache.misses = 0
        start = time.perf_counter()
        features = self._read(shown, mirrored.tolist())
        captions, text = self._said(shown, positions)
        spent.read += time.perf_counter() - start
        pixels = torch.from_numpy(np.stack(images))
        return Batch(pixels, torch.tensor(labels), positions, tuple(replaced), spent, features, captions, text)

    def _read(self, samples: list[int], mirrored: list[bool]) -> Tensor | None:
        """The features of the images that are shown, the replacements among them."""
        if self._features is None:
            return None
        stacked = torch.from_numpy(np.stack(list(map(self._features.read, samples, mirrored))))
        return stacked.view(torch.bfloat16) if self._features.features.dtype == "bf16" else stacked

    def _said(self, samples: list[int], positions: Positions) -> tuple[tuple[str, ...], tuple[Tensor, Tensor] | None]:
        """A caption of each image that is shown, or its features: which one, by seed and position."""
        if self._captions is None:
            return (), None
        uniform = draws.uniform(self.seed, Purpose.CAPTION, positions).tolist()
        found = [self._captions.of(sample) for sample in samples]
        chosen = [captions.choose(some, number) for some, number in zip(found, uniform, strict=True)]
        if self._text is None:
            return tuple(some[number].text for some, number in zip(found, chosen, strict=True)), None
        return (), padded([self._text.read(*which) for which in zip(samples, chosen, strict=True)])

    def _decoded(self, sample: int, position: int, replaced: list[str], spent: Spent) -> tuple[int, Pixels, int]:
        """The sample with image and label, or if it is damaged another one of its bucket: which, depends on seed and
        position alone."""
        try:
            return sample, *self._image(sample, spent)
        except DamagedSample as error:
            damaged: InputError = error
        except DamagedShard as error:
            if self.config.corrupt_shard == "stop":
                raise InputError(f"{error}; data.corrupt_shard = 'replace' replaces its samples") from error
            damaged = error
        replaced.append(str(damaged))
        first, count = self._open()[2].among(sample)
        tries = np.arange(REPLACEMENTS) + REPLACEMENTS * position
        for other in (draws.bits(self.seed, Purpose.REPLACEMENT, tries) % np.uint64(count)).tolist():
            try:
                return first + other, *self._image(first + other, spent)
            except (DamagedSample, DamagedShard):
                continue
        raise damaged

    def _image(self, sample: int, spent: Spent) -> tuple[Pixels, int]:
        reader, decoder, _ = self._open()
        start = time.perf_counter()
        try:
            encoded = reader.read(sample)
            spent.read -= start - (start := time.perf_counter())
            return decoder(encoded.data, encoded.bucket), encoded.label
        except ValueError as error:
            raise DamagedSample(f"{reader.where(sample)}: {error}") from error
        finally:
            spent.decode += time.perf_counter() - start


def padded(rows: Sequence[NDArray[np.int16]]) -> tuple[Tensor, Tensor]:
    """bf16 bit patterns [T_i, C] of each caption -> features bf16 [B, T, C], 0 where there is none, and mask [B, T]."""
    lengths = torch.tensor([len(row) for row in rows])
    features = torch.zeros(len(rows), int(lengths.max()), rows[0].shape[1], dtype=torch.bfloat16)
    for place, row in zip(features, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row.copy()).view(torch.bfloat16)
    return features, torch.arange(features.shape[1]) < lengths[:, None]


def batches(
    config: DataConfig,
    located: Located,
    seed: int,
    layout: BatchLayout,
    rank: int,
    position: int,
    skipped: Skipped,
    beside: Beside = Beside(),
) -> Generator[Batch, None, None]:
    """Endless micro batches of `rank` from `position` on, with what is read beside them.
    Closing it ends the workers.

    Raises:
        InputError: more damaged samples than `max_replaced`, or one without a replacement; names shard and key. Or
            features that cannot be read.
    """
    loader = DataLoader(
        MicroBatches(located, config, seed, layout.total, beside),
        batch_size=None,
        sampler=order.micro_batches(position, layout, rank, skipped, config.reading_groups),
        num_workers=config.workers,
        worker_init_fn=workers.end_with_rank if config.workers else None,
        prefetch_factor=PREFETCH if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=workers.context() if config.workers else None,
    )
    replaced, each = 0, iter(loader)
    workers.end_at_exit()
    for batch in each:
        if isinstance(batch, InputError):
            raise batch
        replaced += len(batch.replaced)
        if replaced > config.max_replaced:
            raise InputError(
                f"{batch.replaced[-1]} (damaged sample number {replaced}, data.max_replaced allows "
                f"{config.max_replaced} on each rank)"
            )
        yield batch
