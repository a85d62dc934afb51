"""Which sample stands at which position of a run: pure functions, no state.

A run takes an endless sequence of positions 0, 1, 2, …. With n samples in the index, position p lies in epoch p // n.
Each epoch is its own permutation of all samples: nothing is dropped at its end, and a global batch may span two epochs.

An epoch permutes the shards, cuts them into windows of `window` shards, and permutes the samples inside each window.
window = 0 is one window of everything, a perfect shuffle; with 64, a batch is read from 64 shards at a time, which
suits disks and networks that like few files at once. For example, with shards a (samples 0 1 2), b (3 4), c (5 6 7)
and d (8 9), window = 2 and seed 0, the first epoch is

    shards  d a | b c        samples  1 8 0 9 2 | 7 4 5 3 6

Reading groups (`groups` = G > 1) cut each epoch's line of shards into G equal parts and let position p take from part
p mod G; the windows are then those of each part. Every batch still takes from all parts, but a node that takes the
positions of some groups reads the shards of those alone. G belongs to the order; the number of nodes, any divisor of
G, does not. With the shards above, G = 2 and window = 0 the line d a | b c is cut in the middle, and the epoch takes
from both halves in turn:

    samples  1 7 8 4 0 5 9 3 2 6        positions 0 2 4 6 8 from d a, positions 1 3 5 7 9 from b c

Step k of the run takes the next B = global batch positions and sorts them by group; rank r takes the r-th share of
that list, one micro batch after the other:

    positions of the step       p, p+1, …, p+B-1           jumping over the skipped ranges
    micro step a of rank r      the slice [(r·accumulation + a)·micro : (r·accumulation + a + 1)·micro]

Example: B = 8 on 2 ranks with micro batch 2 takes, from position 40 and with one group,

    rank 0: [40 41] then [42 43]        rank 1: [44 45] then [46 47]

and on one rank with micro batch 8 the same eight. The state of the data plane is therefore one integer, the position
of the next step, and the (normally empty) list of skipped ranges.

Buckets (images of several sizes): a step holds one bucket. Each bucket is an endless order of its own, as above, and
step k belongs to the bucket whose turn it is: the j-th step of a bucket with n samples is due at time (j + 1/2) / n,
and steps go by time. So at any moment every bucket has had its share of the steps, to within one, and which bucket step
k takes from, and how many steps of it came before, is a function of k alone. Positions must then be whole steps.

Sampling is not balanced over classes: every image is seen once an epoch, so classes are seen as often as they occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heapreplace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megapix import rng
from megapix.config import BatchLayout
from megapix.errors import InputError
from megapix.rng import Purpose
from megapix.shards.index import LARGEST_COUNT
from megapix.shards.tables.entries import ShardEntry, Shards

Positions: TypeAlias = NDArray[np.int64]
Skipped: TypeAlias = Sequence[tuple[int, int]]
"""Sorted, disjoint half-open ranges [start, stop) of positions that are never used."""
TICKS = LARGEST_COUNT**2
"""Of a unit of time in which a bucket has as many steps as samples."""


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
    """One epoch's line of shards, and where its groups and windows begin on it."""

    shards: Positions
    """int64 [S]: shard numbers."""
    starts: Positions
    """int64 [S + 1]: the place on the line at which each of them begins, and the end."""
    groups: Positions
    """int64 [G + 1]: the place at which each group's part begins, and the end."""
    windows: Positions
    """int64 [W + 1]: the place at which each window begins, and the end."""


class SampleOrder:
    """position -> sample number, for shards of the given sizes.

    Args:
        seed: the run's seed.
        sizes: samples of each shard, in the index's order.
        window: shards in one shuffle window; 0 for all.
        groups: reading groups.
    """

    STREAMS = 1 << 24
    """Permutations that belong to one epoch: number 0 orders the shards, number 1 + w the samples of window w."""

    def __init__(self, seed: int, sizes: Sequence[int] | Positions, window: int, groups: int = 1) -> None:
        self.seed = seed
        self.sizes = np.asarray(sizes, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self.total = int(self.first[-1])
        self.window, self.groups = window or len(self.sizes), groups
        self._cached: dict[int, _Epoch] = {}

    def at(self, positions: Positions) -> Positions:
        """Sample numbers (int64, in [0, n)) at `positions`; the cost does not depend on how far they are."""
        out = np.empty_like(positions)
        epochs = positions // self.total
        for number in np.unique(epochs).tolist():
            epoch, inside = self._epoch(number), epochs == number
            chosen = positions[inside]
            group = chosen % self.groups
            before = -((group - number * self.total) // self.groups)  # positions of the group in earlier epochs
            places = epoch.groups[group] + chosen // self.groups - before
            window_of = np.searchsorted(epoch.windows, places, "right") - 1
            for w in np.unique(window_of).tolist():
                some, start = window_of == w, epoch.windows[w]
                stream, size = number * self.STREAMS + 1 + w, int(epoch.windows[w + 1] - start)
                places[some] = start + rng.permuted(self.seed, stream, size, places[some] - start)
            rank = np.searchsorted(epoch.starts, places, "right") - 1
            out[inside] = self.first[epoch.shards[rank]] + places - epoch.starts[rank]
        return out

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._cached:
            count = len(self.sizes)
            shards = rng.permuted(self.seed, number * self.STREAMS, count, np.arange(count))
            starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
            group = np.arange(self.groups)
            # Positions in [first, first + n) that belong to each group: equal but for one.
            first = number * self.total
            before, after = -((group - first) // self.groups), -((group - first - self.total) // self.groups)
            groups = np.concatenate([[0], np.cumsum(after - before)])
            if len(self._cached) > 1:  # a batch spans two epochs at most
                self._cached.pop(min(self._cached))
            self._cached[number] = _Epoch(shards, starts, groups, self._windows(starts, groups))
        return self._cached[number]

    def _windows(self, starts: Positions, groups: Positions) -> Positions:
        """Every `window`-th beginning of a shard, counted from the shard in which each group's part begins."""
        edges = [groups]
        for start, stop in zip(groups[:-1].tolist(), groups[1:].tolist(), strict=True):
            first = int(np.searchsorted(starts, start, "right")) - 1
            inner = starts[first + self.window :: self.window]
            edges.append(inner[(inner > start) & (inner < stop)])
        return np.unique(np.concatenate(edges))


class Order:
    """What stands at each position of a run over an index: one `SampleOrder` for each of its buckets.

    Args:
        seed: the run's seed.
        shards: entries of the index, in the order of their buckets.
        window: shards in one shuffle window; 0 for all.
        groups: reading groups.
        batch: positions of one step, which hold one bucket.
    """

    def __init__(self, seed: int, shards: Sequence[ShardEntry], window: int, groups: int, batch: int) -> None:
        self.batch = batch
        if isinstance(shards, Shards):
            samples, buckets = shards.samples, shards.buckets
        else:
            samples, buckets = np.array([(shard.samples, shard.bucket) for shard in shards], np.int64).T
        numbers, starts = np.unique(buckets, return_index=True)
        self.buckets: list[int] = numbers.tolist()
        sizes = np.split(samples, starts[1:])
        self._counts = [int(some.sum()) for some in sizes]
        self.first = [sum(self._counts[:n]) for n in range(len(self.buckets))]
        self.orders = [
            SampleOrder(self._seed(seed, b), some, window, groups) for b, some in zip(self.buckets, sizes, strict=True)
        ]  # the seed alone where there is one bucket: the order of such data does not know of buckets
        self._turn = lru_cache(maxsize=64)(self._find_turn)

    def at(self, positions: Positions) -> Positions:
        """Sample numbers at the positions of one micro batch, all of one bucket.

        Raises:
            InputError: the positions lie in steps of several buckets.
        """
        if len(self.buckets) == 1:
            return self.orders[0].at(positions)
        turns = {self._turn(step) for step in np.unique(positions // self.batch).tolist()}
        if len(turns) > 1:
            raise InputError(f"positions {positions[0]} to {positions[-1]} do not lie in one step of {self.batch}")
        ((place, number),) = turns
        return self.first[place] + self.orders[place].at(number * self.batch + positions % self.batch)

    @property
    def end(self) -> None:
        """There is none: each sample is drawn again in the next epoch."""
        return None

    def among(self, sample: int) -> tuple[int, int]:
        """(first, count) of the samples of the same bucket."""
        place = int(np.searchsorted(self.first, sample, "right")) - 1
        return self.first[place], self._counts[place]

    def samples_in(self, bucket: int) -> int:
        """Samples of a bucket; 0 of one that is not there."""
        return self._counts[self.buckets.index(bucket)] if bucket in self.buckets else 0

    def of_bucket(self, bucket: int, places: Positions) -> Positions:
        """Sample numbers at places of a bucket's own endless order."""
        place = self.buckets.index(bucket)
        return self.first[place] + self.orders[place].at(places)

    def _seed(self, seed: int, bucket: int) -> int:
        if len(self.buckets) == 1:
            return seed
        return int(rng.bits(seed, Purpose.BUCKET, np.array([bucket]))[0])

    def _find_turn(self, step: int) -> tuple[int, int]:
        """(place in `buckets`, number of the step among those of its bucket) of a step.

        At time step / samples every bucket has had its share to within half a step, so the step asked for is a few
        steps away: in the order of their times, each bucket's next ones ahead, or its last ones back.
        """
        total = sum(self._counts)
        before = [(2 * step * count + total - 1) // (2 * total) for count in self._counts]
        ahead = step - sum(before)
        back = ahead < 0
        nearest = [
            (self._due(place, number, back), -place if back else place, number)
            for place, number in enumerate(number - back for number in before)
            if number >= 0
        ]
        heapify(nearest)
        for _ in range(-ahead - 1 if back else ahead):
            _, place, number = nearest[0]
            if back and number == 0:
                heappop(nearest)
                continue
            number += -1 if back else 1
            heapreplace(nearest, (self._due(abs(place), number, back), place, number))
        _, place, number = nearest[0]
        return abs(place), number

    def _due(self, place: int, number: int, back: bool) -> int:
        """What orders the steps of all buckets by time, (2·number + 1) / samples of the bucket; with `back` from the
        latest on. Two such fractions that differ do so by TICKS⁻¹ or more: as whole numbers of ticks they are exact."""
        due = (2 * number + 1) * TICKS // self._counts[place]
        return -due if back else due


def micro_batches(
    position: int, layout: BatchLayout, rank: int, skipped: Skipped, groups: int = 1
) -> Iterator[Positions]:
    """Endless micro batches of `rank`, starting with the step at `position`: int64 [micro] each."""
    while True:
        step, position = take(position, layout.total, skipped)
        if groups > 1:
            step = step[np.argsort(step % groups, kind="stable")]
        yield from step.reshape(layout.ranks, layout.accumulation, layout.micro)[rank]
