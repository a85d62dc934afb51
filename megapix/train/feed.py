"""Where a run's micro batches come from: the loader, the time waited for it, and REPA's stored features while REPA is
on."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import partial

from megapix.data import loader
from megapix.data.arrays import ReadTimes
from megapix.data.batch import Batch
from megapix.data.mix.located import LocatedMix, order_of, with_weights
from megapix.data.mix.order import MixOrder
from megapix.diffusion import flow, repa
from megapix.dist import gather, warn
from megapix.monitoring.meters import Clock
from megapix.train.progress import Progress
from megapix.train.run import Run


class Feed:
    """This rank's micro batches from where the run stands. Close it at the end."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._stored = run.resolved.features if self.aligned else None
        self._data, self._position = with_weights(run.resolved.located, progress.weights), progress.counters.position
        self._order = order_of(self._data, run.config.data, run.config.seed, run.resolved.layout.total)
        self._batches = self._open()
        self._clock, self._times, self._replaced, self._drawn = Clock(), ReadTimes(), 0, progress.counters.drawn

    @property
    def aligned(self) -> bool:
        """Whether the next step has the alignment loss."""
        return repa.active(self._run.config.repa, self._progress.counters.images_seen)

    def next(self) -> Batch:
        """The next micro batch; the wait for it is timed, and each replaced sample is warned about."""
        if self._stored and not self.aligned:  # the workers have read ahead; from here on none reads features
            self._batches.close()
            self._stored = None
            self._batches = self._open()
        with self._clock.waiting():
            batch = next(self._batches)
        self._times.add(batch.times)
        self._replaced += len(batch.replaced)
        for fault in batch.replaced:
            warn(f"rank {self._run.world.rank} replaced a damaged sample: {fault}")
        return batch

    def row(self) -> dict[str, float]:
        """Scalars of the steps since the last row: throughput, waiting, reading. Every rank calls it."""
        drawn, self._drawn = self._progress.counters.drawn - self._drawn, self._progress.counters.drawn
        row = self._clock.read(drawn) | self._times.row(drawn // self._run.resolved.layout.ranks)
        row["health/replaced_samples"] = sum(gather(self._run.world, self._replaced))
        if isinstance(self._data, LocatedMix) and isinstance(self._order, MixOrder):
            row |= self._data.row(self._order, self._position, position := self._progress.counters.position)
            self._position = position
        self._times = ReadTimes()
        return row

    def close(self) -> None:
        """End the loader's workers."""
        self._batches.close()

    def _open(self) -> Generator[Batch, None, None]:
        resolved, counters, c = self._run.resolved, self._progress.counters, self._run.config
        draw = partial(flow.draw, seed=c.seed, config=c.flow)
        return loader.batches(
            resolved.config.data,
            self._data,
            resolved.config.seed,
            resolved.layout,
            self._run.world.rank,
            counters.position,
            counters.skipped,
            replace(resolved.text.extras(self._stored), draw=draw),
        )
