"""Micro batches for one rank, in the order of `order.py`: positions -> read -> decode -> flip -> `Batch`.

Stage by stage, in worker processes (or, with workers = 0, in the training process):

    order.micro_batches   positions of this rank's next micro batches, from the run's position on
    order.SampleOrder     position -> sample number, by the epoch's permutation
    read.ShardReader      sample number -> encoded image and label, one pread
    decode.Decoder        -> uint8 image [3, H, W]; another sample's, by (seed, position), if this one is damaged
    flip                  mirrored where (seed, position) says so

Resume contract: `batches(..., position=p)` yields exactly what a loader started at 0 yields after p positions, for any
number of ranks and workers and any micro batch. Workers hold no state that matters; torch's DataLoader hands their
results over in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megapix import draws
from megapix.config import BatchLayout, DataConfig
from megapix.data import order
from megapix.data.decode import Decoder
from megapix.data.order import Positions, Skipped
from megapix.data.read import ShardReader
from megapix.draws import Purpose
from megapix.errors import InputError
from megapix.shards import Index

PREFETCH = 4
"""Micro batches that each worker keeps ready."""
REPLACEMENTS = 8
"""Samples that are tried in place of a damaged one; if all are damaged too, the shards are."""


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

    def pin_memory(self) -> Batch:
        """Page-locked copies, so that the transfer to a GPU does not wait (called by DataLoader)."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.positions, self.replaced)


class MicroBatches(Dataset[Batch]):
    """Maps an array of positions to its `Batch`; the reader is opened in the process that uses it."""

    def __init__(self, folder: str | Path, index: Index, seed: int, flip: bool, window: int = 0) -> None:
        self.folder, self.index, self.seed, self.flip = folder, index, seed, flip
        self._order = order.SampleOrder(seed, [shard.samples for shard in index.shards], window)
        self._reader: ShardReader | None = None
        self._decoder = Decoder(index.image_size)

    def __getitem__(self, positions: Positions) -> Batch | InputError:  # type: ignore[override]
        """The micro batch, or the InputError: an exception would reach the trainer wrapped in a traceback."""
        if self._reader is None:
            self._reader = ShardReader(self.folder, self.index)
        size = self.index.image_size
        images, labels = np.empty((len(positions), 3, size, size), np.uint8), np.empty(len(positions), np.int64)
        mirrored = draws.uniform(self.seed, Purpose.FLIP, positions) < 0.5
        replaced: list[str] = []
        try:
            for i, sample in enumerate(self._order.at(positions).tolist()):
                image, labels[i] = self._decoded(sample, int(positions[i]), replaced)
                images[i] = image[..., ::-1] if self.flip and mirrored[i] else image
        except InputError as error:
            return error
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), positions, tuple(replaced))

    def _decoded(self, sample: int, position: int, replaced: list[str]) -> tuple[NDArray[np.uint8], int]:
        """The sample, or if it is damaged another one: which, depends on seed and position alone."""
        assert self._reader is not None
        try:
            return self._decoder(self._reader.read(sample), self.index.image_extension)
        except InputError as error:
            replaced.append(str(error))
            tries = np.arange(REPLACEMENTS) + REPLACEMENTS * position
            for other in (draws.bits(self.seed, Purpose.REPLACEMENT, tries) % np.uint64(self.index.samples)).tolist():
                try:
                    return self._decoder(self._reader.read(other), self.index.image_extension)
                except InputError:
                    continue
            raise


def batches(
    config: DataConfig, index: Index, seed: int, layout: BatchLayout, rank: int, position: int, skipped: Skipped
) -> Iterator[Batch]:
    """Endless micro batches of `rank` from `position` on.

    Raises:
        InputError: more damaged samples than `max_replaced`, or one without a replacement; names shard and key.
    """
    loader = DataLoader(
        MicroBatches(config.path, index, seed, config.flip, config.shuffle_window),
        batch_size=None,
        sampler=order.micro_batches(position, layout, rank, skipped),
        num_workers=config.workers,
        prefetch_factor=PREFETCH if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        # Workers start from a clean server process: a fork of the trainer would copy its threads' locks.
        multiprocessing_context="forkserver" if config.workers else None,
    )
    replaced = 0
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        replaced += len(batch.replaced)
        if replaced > config.max_replaced:
            raise InputError(
                f"{batch.replaced[-1]} (damaged sample number {replaced}, data.max_replaced allows "
                f"{config.max_replaced} on each rank)"
            )
        yield batch
