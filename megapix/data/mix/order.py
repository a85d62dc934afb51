"""Which sample stands at which position of a run over a mix: a function of seed, weights and data alone.

A mix is several sets, each with a weight. Sample numbers go through the sets in their order.

    buckets    a step holds one bucket, as in `order.Order`: which one goes by the share of samples that all sets
               together have in it, each set's by its weight
    sets       the positions of a bucket's steps go to the sets by turns (`turns.Line`), by weight · the share that the
               bucket has of the set
    groups     positions of one reading group have turns of their own, a fraction of a turn apart, so that a group's
               positions take from that group's part of every set
    samples    each set is an endless order of its own (`order.SampleOrder`), in each bucket, of which its n-th turn
               takes place n: every sample once an epoch of the set

Weights are those of a schedule: a list of `Stretch`, each from a position on. A change of weights moves no set in its
own order. A set with a repeat limit leaves a bucket with the last sample of its last epoch there, and the shares of the
others grow; a bucket that no set is left in has no more steps, and when none is left the run is at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np

from megapix import rng
from megapix.data.mix.turns import Counts, Line, Parts, parts_of
from megapix.data.order import Order, Positions
from megapix.errors import InputError
from megapix.rng import Purpose
from megapix.shards.index import ShardEntry

Rate: TypeAlias = tuple[Parts, list[int | None]]
KEY_DIGITS = 15
"""Hexadecimal digits of a set's digest that its order depends on: below 2^63."""


class Stretch(NamedTuple):
    """The weights from a position of the run on."""

    position: int
    weights: Parts
    """Of each set, as whole numbers in the ratio of its weight."""
    repeats: tuple[float | None, ...]
    """Epochs after which each set leaves; None is never."""


class _Bucket:
    """The turns of the sets in the steps of one bucket.

    Args:
        samples: of each set in this bucket.
        totals: of each set in all.
        groups: reading groups.
    """

    def __init__(self, samples: Sequence[int], totals: Sequence[int], groups: int) -> None:
        self._samples, self._totals, self._groups = samples, totals, groups
        self._changes: list[tuple[int, Stretch]] = []
        self._lanes: dict[int, Line] = {}

    def change(self, slot: int, stretch: Stretch) -> None:
        """Have other weights from a slot on."""
        self._changes.append((slot, stretch))
        self._lanes.clear()

    def shares(self, weights: Sequence[int]) -> list[Fraction]:
        """What these sets have of all turns, in this bucket: weight · share of its samples."""
        numbers = zip(weights, self._samples, self._totals, strict=True)
        return [Fraction(weight * samples, total) for weight, samples, total in numbers]

    def lane(self, group: int) -> Line:
        """Turns of the sets at the slots of a reading group."""
        if group not in self._lanes:
            line = Line(len(self._samples), (2 * group + 1, 2 * self._groups))
            for slot, stretch in self._changes:
                parts = parts_of(self.shares(stretch.weights))
                limits = self._limits(stretch, group)

                def rates(had: Counts, parts: Parts = parts, limits: list[int | None] = limits) -> Rate:
                    left = zip(parts, had.tolist(), limits, strict=True)
                    return tuple(p if limit is None or n < limit else 0 for p, n, limit in left), limits

                line.extend(_of_group(slot, group, self._groups), rates)
            self._lanes[group] = line
        return self._lanes[group]

    def _limits(self, stretch: Stretch, group: int) -> list[int | None]:
        limits = zip(stretch.repeats, self._samples, strict=True)
        return [
            None if repeat is None else _of_group(int(Fraction(str(repeat)) * samples), group, self._groups)
            for repeat, samples in limits
        ]

    @property
    def end(self) -> int | None:
        """The first slot that no set has, if there is one."""
        if not self._limited:
            return None
        ends = [(self.lane(group).end, group) for group in range(self._groups)]
        return min((end * self._groups + group for end, group in ends if end is not None), default=None)

    @property
    def _limited(self) -> bool:
        return any(repeat is not None for repeat in self._changes[-1][1].repeats)

    def left(self) -> list[tuple[int, tuple[bool, ...]]]:
        """(slot, which sets are left from it on) wherever that changes since the last change of weights."""
        if not self._limited:
            return []
        first = self._changes[-1][0]
        lanes = [(self.lane(group), group) for group in range(self._groups)]
        slots = {piece.start * self._groups + group for lane, group in lanes for piece in lane.pieces}
        found = []
        for slot in sorted(slot for slot in slots if slot > first):
            left = np.zeros(len(self._samples), bool)
            for lane, group in lanes:
                now = [p for p in lane.pieces if p.start <= _of_group(slot, group, self._groups)]
                left |= np.array(now[-1].parts) > 0
            found.append((slot, tuple(left.tolist())))
        return found

    def drawn(self, slot: int) -> Counts:
        """Turns of each set before a slot: int64 [S]."""
        groups = range(self._groups)
        counts = [self.lane(group).before(_of_group(slot, group, self._groups)) for group in groups]
        return np.sum(counts, axis=0, dtype=np.int64)


class MixOrder:
    """What stands at each position of a run over a mix.

    Args:
        seed: the run's seed.
        sets: digest and entries of the index of each set.
        schedule: the weights, in the order of their positions; the first from 0 on.
        window: shards in one shuffle window of a set; 0 for all.
        groups: reading groups.
        batch: positions of one step, which hold one bucket.
    """

    def __init__(
        self,
        seed: int,
        sets: Sequence[tuple[str, Sequence[ShardEntry]]],
        schedule: Sequence[Stretch],
        window: int,
        groups: int,
        batch: int,
    ) -> None:
        self.batch, self._groups = batch, groups
        keys = np.array([int(digest[:KEY_DIGITS], 16) for digest, _ in sets], np.int64)
        seeds = rng.bits(seed, Purpose.SET, keys).tolist()
        self._orders = [Order(s, shards, window, groups, batch) for s, (_, shards) in zip(seeds, sets, strict=True)]
        self.totals = [sum(map(order.samples_in, order.buckets)) for order in self._orders]
        self.first = np.cumsum([0, *self.totals])[:-1]
        self.buckets = sorted({bucket for order in self._orders for bucket in order.buckets})
        self._buckets = [
            _Bucket([order.samples_in(bucket) for order in self._orders], self.totals, groups)
            for bucket in self.buckets
        ]
        self._steps = Line(len(self.buckets))
        self._turn = lru_cache(maxsize=64)(self._find_turn)
        for stretch in schedule:
            self._change(stretch)
        self.end = self._end()
        """The position from which on no set is left, if there is one."""

    def at(self, positions: Positions) -> Positions:
        """Sample numbers at the positions of one micro batch, all of one bucket: int64 [N].

        Raises:
            InputError: the positions lie in steps of several buckets, or beyond the end.
        """
        place, slots = self._slots(positions)
        out, groups = np.empty_like(positions), slots % self._groups
        for group in np.unique(groups).tolist():
            inside = np.flatnonzero(groups == group)
            sets, turns = self._buckets[place].lane(group).at(slots[inside] // self._groups)
            for number in np.unique(sets).tolist():
                mine = sets == number
                samples = self._orders[number].of_bucket(self.buckets[place], turns[mine] * self._groups + group)
                out[inside[mine]] = self.first[number] + samples
        return out

    def among(self, sample: int) -> tuple[int, int]:
        """(first, count) of the samples of the same set and bucket."""
        number = self.set_of(sample)
        first, count = self._orders[number].among(sample - int(self.first[number]))
        return int(self.first[number]) + first, count

    def set_of(self, sample: int) -> int:
        """Number of the set that a sample belongs to."""
        return int(np.searchsorted(self.first, sample, "right")) - 1

    def drawn(self, position: int) -> Counts:
        """Samples of each set before a position: int64 [S]."""
        return np.sum([b.drawn(slot) for b, slot in zip(self._buckets, self._filled(position), strict=True)], axis=0)

    def _slots(self, positions: Positions) -> tuple[int, Positions]:
        """(place in `buckets`, slots among those of the bucket) of positions."""
        if len(self.buckets) == 1:
            return 0, positions
        turns = {self._turn(step) for step in np.unique(positions // self.batch).tolist()}
        if len(turns) > 1:
            raise InputError(f"positions {positions[0]} to {positions[-1]} do not lie in one step of {self.batch}")
        ((place, number),) = turns
        return place, number * self.batch + positions % self.batch

    def _find_turn(self, step: int) -> tuple[int, int]:
        (place,), (number,) = self._steps.at(np.array([step]))
        return int(place), int(number)

    def _filled(self, position: int) -> list[int]:
        """Slots of each bucket before a position."""
        if len(self.buckets) == 1:
            return [position]
        return [steps * self.batch for steps in self._steps.before(position // self.batch).tolist()]

    def _change(self, stretch: Stretch) -> None:
        filled = self._filled(stretch.position) if stretch.position else [0] * len(self.buckets)
        for bucket, slot in zip(self._buckets, filled, strict=True):
            bucket.change(slot, stretch)
        if len(self.buckets) == 1:
            return
        shares = [bucket.shares(stretch.weights) for bucket in self._buckets]
        left = [bucket.left() for bucket in self._buckets]
        ends = [None if bucket.end is None else bucket.end // self.batch for bucket in self._buckets]

        def rates(had: Counts) -> Rate:
            """Parts of the buckets by what the sets that are left have in each, and when one of those leaves."""
            now, changes = list[Fraction](), list[int | None]()
            for place, steps in enumerate(had.tolist()):
                marks = [(-(-slot // self.batch), sets) for slot, sets in left[place]]
                those = [sets for step, sets in marks if step <= steps]
                mine = (
                    [s for s, there in zip(shares[place], those[-1], strict=True) if there] if those else shares[place]
                )
                ahead = [step for step, _ in marks if step > steps]
                if (end := ends[place]) is not None:
                    ahead.append(end)
                    mine = mine if steps < end else []
                now.append(sum(mine, Fraction()))
                changes.append(min((step for step in ahead if step > steps), default=None))
            return parts_of(now), changes

        self._steps.extend(stretch.position // self.batch, rates)

    def _end(self) -> int | None:
        if len(self.buckets) == 1:
            return self._buckets[0].end
        return None if self._steps.end is None else self._steps.end * self.batch


def extended(schedule: Sequence[Stretch], now: Stretch) -> tuple[Stretch, ...]:
    """The schedule with the weights of `now`, if they are others than those before its position."""
    earlier = tuple(stretch for stretch in schedule if stretch.position < now.position)
    if earlier and (earlier[-1].weights, earlier[-1].repeats) == (now.weights, now.repeats):
        return earlier
    return (*earlier, now)


def _of_group(slot: int, group: int, groups: int) -> int:
    """How many slots below `slot` belong to a reading group."""
    return max(0, -((group - slot) // groups))
