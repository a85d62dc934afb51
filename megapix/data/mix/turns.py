"""Streams that take turns by their shares: which stream has slot n of an endless line, as a function of n alone.

A stream with w parts of W has its j-th turn at time (j + phase) / w, and slots go by time, ties to the first stream. So
at any slot a stream with share s, one of S streams, has had its share of the turns to within (1 + s·S) / 2. The line
repeats itself after W slots, which is why a slot is found without walking there: all that is sorted are the turns
around it.

A line is cut into pieces where shares change: a piece begins to count times anew, the streams go on counting turns.

Example: streams with 2 and 1 parts have their turns at 1/4 3/4 5/4 … and 1/2 3/2 …, so the line is 0 1 0 | 0 1 0 | ….
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError

Counts: TypeAlias = NDArray[np.int64]
Parts: TypeAlias = tuple[int, ...]
Phase: TypeAlias = tuple[int, int]
"""A fraction between 0 and 1: numerator and denominator."""
Rates: TypeAlias = Callable[[Counts], tuple[Parts, list[int | None]]]
"""Turns that each stream has had -> its parts now, and the number of turns at which they change (None: never)."""

MOST_PARTS = 1 << 20
"""Of all streams together. With it, and denominators of phases below 2^13, float64 tells any two times apart."""
HALF: Phase = (1, 2)
BLOCK = 512
"""Slots that are found at once."""


def parts_of(weights: Sequence[Fraction]) -> Parts:
    """Whole numbers in the ratio of the weights; where their sum would exceed MOST_PARTS, the nearest with that sum, at
    least 1 for a weight above 0."""
    whole = sum(weights, Fraction())
    if not whole:
        return (0,) * len(weights)
    scale = lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * scale) for weight in weights]
    divisor = gcd(*numbers)
    if sum(numbers) // divisor <= MOST_PARTS:
        return tuple(number // divisor for number in numbers)
    parts = [max(1, round(weight / whole * MOST_PARTS)) if weight else 0 for weight in weights]
    parts[parts.index(max(parts))] += MOST_PARTS - sum(parts)
    return tuple(parts)


@dataclass(frozen=True)
class Piece:
    """A part of the line in which shares stay the same."""

    start: int
    """Its first slot."""
    parts: Parts
    before: Counts
    """Turns that each stream has had before it: int64 [S]."""


class Line:
    """slot -> (stream, number of its turn).

    Args:
        streams: how many there are.
        phase: of the turns, between 0 and 1.
    """

    def __init__(self, streams: int, phase: Phase = HALF) -> None:
        self.streams, self._phase = streams, phase
        self._pieces: list[Piece] = []
        self.end: int | None = None
        """The slot from which on no stream is left, if that is known."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """In order."""
        return self._pieces

    def extend(self, start: int, rates: Rates) -> None:
        """Go on from slot `start` with other shares; what was set from there on is forgotten."""
        before = self.before(start)
        while self._pieces and self._pieces[-1].start >= start:
            self._pieces.pop()
        self.end = None
        while True:
            parts, changes = rates(before)
            if not any(parts):
                self.end = start
                return
            self._pieces.append(Piece(start, parts, before))
            last = [
                ((Fraction(change - int(had) - 1) + Fraction(*self._phase)) / part, stream)
                for stream, (change, had, part) in enumerate(zip(changes, before, parts, strict=True))
                if part and change is not None
            ]
            if not last:
                return
            start += _turns_until(parts, self._phase, *min(last))
            before = self.before(start)

    def at(self, slots: Counts) -> tuple[Counts, Counts]:
        """Streams and numbers of their turns at `slots`: int64 of the same shape [N].

        Raises:
            InputError: no stream is left there.
        """
        if self.end is not None and slots.max() >= self.end:
            raise InputError(f"slot {slots.max()} lies beyond the end of all streams, {self.end}")
        streams, numbers = np.empty_like(slots), np.empty_like(slots)
        starts = [piece.start for piece in self._pieces]
        piece_of = np.searchsorted(starts, slots, "right") - 1
        for place in np.unique(piece_of).tolist():
            piece, inside = self._pieces[place], np.flatnonzero(piece_of == place)
            offsets = slots[inside] - piece.start
            for block in np.unique(offsets // BLOCK).tolist():
                some = offsets // BLOCK == block
                found, turns = _block(piece.parts, self._phase, block)
                chosen = offsets[some] - block * BLOCK
                streams[inside[some]] = found[chosen]
                numbers[inside[some]] = turns[chosen] + piece.before[found[chosen]]
        return streams, numbers

    def before(self, slot: int) -> Counts:
        """Turns of each stream before a slot: int64 [S]."""
        if not self._pieces:
            return np.zeros(self.streams, np.int64)
        place = max(0, bisect_right(self._pieces, slot, key=lambda piece: piece.start) - 1)
        piece = self._pieces[place]
        if slot <= piece.start:
            return piece.before
        return piece.before + _counts(piece.parts, self._phase, slot - piece.start)


@lru_cache(maxsize=256)
def _block(parts: Parts, phase: Phase, block: int) -> tuple[Counts, Counts]:
    """Streams and turns of BLOCK slots of a piece."""
    periods, start = divmod(block * BLOCK, sum(parts))
    first, streams, turns = _around(parts, phase, start, start + BLOCK)
    skip = start - int(first.sum())
    streams, turns = streams[skip : skip + BLOCK], turns[skip : skip + BLOCK]
    return streams, turns + periods * np.array(parts, np.int64)[streams]


def _counts(parts: Parts, phase: Phase, slot: int) -> Counts:
    """Turns of each stream in the first `slot` slots of a piece."""
    periods, slot = divmod(slot, sum(parts))
    first, streams, _ = _around(parts, phase, slot, slot)
    more = np.bincount(streams[: slot - int(first.sum())], minlength=len(parts))
    return first + more + periods * np.array(parts, np.int64)


def _around(parts: Parts, phase: Phase, start: int, stop: int) -> tuple[Counts, Counts, Counts]:
    """Turns due around the slots [start, stop): how many are earlier, of each stream; streams and turns by time."""
    p, (numerator, denominator) = np.array(parts, np.int64), phase
    some = int((p > 0).sum())  # a stream may be one turn ahead or behind, so all together are that many
    first, last = (_due(p, phase, slot) for slot in (max(0, start - some), stop + some))
    counts = last - first
    streams = np.repeat(np.arange(len(p)), counts)
    turns = np.arange(len(streams)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    times = (turns * denominator + numerator) / (p[streams] * denominator)
    order = np.lexsort((streams, times))
    return first, streams[order], turns[order]


def _due(p: Counts, phase: Phase, slot: int) -> Counts:
    """Turns of each stream whose time is before that of a slot, slot / sum(p)."""
    (numerator, denominator), whole = phase, int(p.sum())
    due = -((numerator * whole - p * slot * denominator) // (denominator * whole))
    return np.where(p > 0, np.maximum(due, 0), 0)


def _turns_until(parts: Parts, phase: Phase, time: Fraction, last: int) -> int:
    """How many turns there are up to that of the stream `last` at this time, which counts."""
    count = 0
    for stream, part in enumerate(parts):
        turn = part * time - Fraction(*phase)  # at this time; those below it are earlier
        whole = turn.numerator // turn.denominator
        count += max(0, whole + (turn.denominator > 1 or stream <= last)) if part else 0
    return count
