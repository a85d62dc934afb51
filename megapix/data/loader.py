"""Micro batches for one rank: each stage of `megapix.data` put together, in worker processes.

`assemble.Assembler` maps positions to arrays, in this process or in workers; `batches` makes tensors of them, which a
GPU can take without waiting, one micro batch ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch

from megapix.config import BatchLayout, DataConfig
from megapix.data.arrays import NO_EXTRAS, Arrays, Extras
from megapix.data.assemble import Asked, Assembler
from megapix.data.batch import Batch
from megapix.data.mix.located import Data
from megapix.data.order import Positions, Skipped
from megapix.data.workers import Workers
from megapix.errors import InputError, StorageError


class MicroBatches:
    """Maps an array of positions to its `Batch`, in this process; arguments as of `Assembler`."""

    def __init__(self, located: Data, config: DataConfig, seed: int, batch: int, extras: Extras = NO_EXTRAS) -> None:
        self._assembler, self._extras = Assembler(located, config, seed, batch, extras), extras

    def __getitem__(self, positions: Positions) -> Batch | InputError | StorageError:
        """The micro batch, or what kept it back."""
        try:
            return Batch.of(self._assembler.at(positions), self._extras)
        except (InputError, StorageError) as error:
            return error


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
    assembler = Assembler(located, config, seed, layout.total, replace(extras, draw=None))
    asked = Asked(position, layout, rank, skipped, config.reading_groups)
    workers = Workers(assembler, asked, config.workers, rank) if config.workers else None
    made = _ahead(workers.each(), extras) if workers else _here(assembler.each(asked.some(0, 1)), extras)
    replaced = 0
    try:
        for batch in made:
            replaced += len(batch.replaced)
            if replaced > config.max_replaced:
                raise InputError(
                    f"{batch.replaced[-1]} (damaged sample number {replaced}, data.max_replaced allows "
                    f"{config.max_replaced} on each rank)"
                )
            yield batch
    finally:
        if workers:
            workers.close()


def _here(made: Iterator[Arrays | InputError | StorageError], extras: Extras) -> Iterator[Batch]:
    return (_ready(read, extras) for read in made)


def _ready(read: Arrays | InputError | StorageError, extras: Extras) -> Batch:
    """The batch as a GPU wants it, if there is one.

    Raises:
        InputError, StorageError: what kept it back.
    """
    if isinstance(read, (InputError, StorageError)):
        raise read
    batch = Batch.of(read, extras)
    return batch.pin_memory() if torch.cuda.is_available() else batch


def _ahead(made: Iterator[Arrays | InputError | StorageError], extras: Extras) -> Generator[Batch, None, None]:
    """As `_here`, in a thread, one batch ahead."""
    wanted, found = SimpleQueue[bool](), SimpleQueue[Any]()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def work() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        while wanted.get():
            try:
                found.put((_ready(next(made), extras), None))
            except BaseException as error:  # raised where the batch is asked for
                found.put((None, error))

    threading.Thread(target=work, name="batch ahead", daemon=True).start()
    wanted.put(True)
    try:
        while True:
            batch, error = found.get()
            if error is not None:
                raise error
            wanted.put(True)
            yield batch
    finally:
        wanted.put(False)
