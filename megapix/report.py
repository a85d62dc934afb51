"""The numbers of a run between two rows of scalars: losses, throughput, waiting, memory, data, saves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megapix import dist, flops, metrics
from megapix.checkpoint import Counters
from megapix.config import BatchLayout, Config
from megapix.data.loader import Batch, Spent
from megapix.dist import World
from megapix.saver import Saver


class Report:
    """Collects on every rank what the next row says; `row` starts again.

    Args:
        drawn: samples drawn by the run when it starts to collect.
    """

    def __init__(
        self, config: Config, layout: BatchLayout, world: World, device: torch.device, saver: Saver, drawn: int
    ) -> None:
        self._layout, self._world, self._device, self._saver = layout, world, device, saver
        self._cost, self._peak = flops.of_run(config), flops.peak_of(config, device)
        self._losses, self._clock, self._spent = metrics.LossMeter(device), metrics.Clock(), Spent()
        self._apart = metrics.DeviceMean(device) if config.repa.wanted else None
        self._replaced, self._drawn, self._stall = 0, drawn, saver.stall

    def draw(self, batches: Iterator[Batch]) -> Batch:
        """The next micro batch; the wait for it is counted, and damaged samples that were replaced are said aloud."""
        with self._clock.waiting():
            batch = next(batches)
        self._spent.add(batch.spent)
        self._replaced += len(batch.replaced)
        for fault in batch.replaced:
            dist.warn(f"rank {self._world.rank} replaced a damaged sample: {fault}")
        return batch

    def add(self, loss: Tensor, t: Tensor) -> None:
        """Take a micro batch's losses [B] and times [B]; does not wait for the device."""
        self._losses.add(loss, t)

    def add_apart(self, apart: Tensor) -> None:
        """Take a micro batch's distances from REPA's features [B]; does not wait for the device."""
        assert self._apart, "there is a distance only with REPA"
        self._apart.add(apart)

    def row(self, counters: Counters) -> dict[str, float]:
        """Scalars of the steps since the last row, up to `counters`. Every rank calls it."""
        drawn, self._drawn = counters.drawn - self._drawn, counters.drawn
        row = self._losses.read(self._world.size) | self._clock.read(drawn) | metrics.memory(self._device)
        if self._apart and (apart := self._apart.read(self._world.size)) is not None:
            row["loss/repa"] = apart
        row |= flops.speed(row["speed/images_per_s"], self._cost, self._world.size, self._peak)
        row |= self._spent.row(drawn // self._layout.ranks)
        row["schedule/images_seen"] = counters.images_seen
        row["health/skipped_steps"] = (counters.drawn - counters.images_seen) // self._layout.total
        row["health/replaced_samples"] = sum(dist.gather(self._world, self._replaced))
        row["speed/save_stall_s"] = self._saver.stall - self._stall
        self._spent, self._stall = Spent(), self._saver.stall
        return row
