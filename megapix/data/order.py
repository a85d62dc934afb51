"""Which sample stands at which position of a run: pure functions, no state.

A run draws an endless sequence of positions 0, 1, 2, …. With n samples in the index, position p lies in epoch p // n.
Each epoch is its own permutation of all samples: nothing is dropped at its end, and a global batch may span two epochs.

An epoch permutes the shards, cuts them into windows of `window` shards, and permutes the samples inside each window.
window = 0 is one window of everything, a perfect shuffle; with 64, a batch is read from 64 shards at a time, which
suits disks and networks that like few files at once. For example, with shards a (samples 0 1 2), b (3 4), c (5 6 7)
and d (8 9), window = 2 and seed 0, the first epoch is

    shards  d a | b c        samples  1 8 0 9 2 | 7 4 5 3 6

Step k of the run takes the next B = global batch positions; rank r's micro step a takes its share of them:

    positions of the step      p, p+1, …, p+B-1            jumping over the skipped ranges
    micro step a of rank r     the slice [(a·ranks + r)·micro : (a·ranks + r + 1)·micro]

Example: B = 8 on 2 ranks with micro batch 2 takes, from position 40,

    rank 0: [40 41] then [44 45]        rank 1: [42 43] then [46 47]

and on one rank with micro batch 8 the same eight. The state of the data plane is therefore one integer, the position
of the next step, and the (normally empty) list of skipped ranges.

Sampling is not balanced over classes: every image is seen once an epoch, so classes are seen as often as they occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megapix import draws
from megapix.config import BatchLayout

Positions: TypeAlias = NDArray[np.int64]
Skipped: TypeAlias = Sequence[tuple[int, int]]
"""Sorted, disjoint half-open ranges [start, stop) of positions that are never drawn."""


def take(position: int, count: int, skipped: Skipped) -> tuple[Positions, int]:
    """The next `count` positions from `position` on, outside `skipped`, and the position that follows them."""
    parts: list[Positions] = []
    missing = count
    for start, stop in skipped:
        if stop <= position or missing == 0:
            continue
        free = min(max(0, start - position), missing)
        parts.append(np.arange(position, position + free, dtype=np.int64))
        missing -= free
        position = stop if missing else position + free
    parts.append(np.arange(position, position + missing, dtype=np.int64))
    return np.concatenate(parts), position + missing


@dataclass(frozen=True)
class _Epoch:
    """One epoch's shards in their order, and where its windows begin."""

    shards: Positions
    """int64 [S]: shard numbers."""
    starts: Positions
    """int64 [S + 1]: the epoch's position at which each of them begins, and the end."""
    windows: Positions
    """int64 [W + 1]: the epoch's position at which each window begins, and the end."""


class SampleOrder:
    """position -> sample number, for shards of the given sizes.

    Args:
        seed: the run's seed.
        sizes: samples of each shard, in the index's order.
        window: shards in one shuffle window; 0 for all.
    """

    STREAMS = 1 << 24
    """Permutations that belong to one epoch: number 0 orders the shards, number 1 + w the samples of window w."""

    def __init__(self, seed: int, sizes: Sequence[int], window: int) -> None:
        self.seed = seed
        self.sizes = np.asarray(sizes, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.total = int(self.first[-1])
        self.window = window or len(self.sizes)
        self._cached: dict[int, _Epoch] = {}

    def at(self, positions: Positions) -> Positions:
        """Sample numbers (int64, in [0, n)) at `positions`; the cost does not depend on how far they are."""
        out = np.empty_like(positions)
        epochs = positions // self.total
        for number in np.unique(epochs).tolist():
            epoch, inside = self._epoch(number), epochs == number
            places = positions[inside] % self.total
            window_of = np.searchsorted(epoch.windows, places, "right") - 1
            for w in np.unique(window_of).tolist():
                chosen, start = window_of == w, epoch.windows[w]
                stream, size = number * self.STREAMS + 1 + w, int(epoch.windows[w + 1] - start)
                places[chosen] = start + draws.permuted(self.seed, stream, size, places[chosen] - start)
            rank = np.searchsorted(epoch.starts, places, "right") - 1
            out[inside] = self.first[epoch.shards[rank]] + places - epoch.starts[rank]
        return out

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._cached:
            count = len(self.sizes)
            shards = draws.permuted(self.seed, number * self.STREAMS, count, np.arange(count))
            starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
            edges = np.append(np.arange(0, count, self.window), count)
            if len(self._cached) > 1:  # a batch spans two epochs at most
                self._cached.pop(min(self._cached))
            self._cached[number] = _Epoch(shards, starts, starts[edges])
        return self._cached[number]


def micro_batches(position: int, layout: BatchLayout, rank: int, skipped: Skipped) -> Iterator[Positions]:
    """Endless micro batches of `rank`, starting with the step at `position`: int64 [micro] each."""
    while True:
        step, position = take(position, layout.total, skipped)
        yield from step.reshape(layout.accumulation, layout.ranks, layout.micro)[:, rank]
