"""Which sample stands at which position of a run: pure functions, no state.

A run draws an endless sequence of positions 0, 1, 2, …. With n samples in the index, position p lies in epoch p // n
and names sample `permuted(seed, epoch, n)[p % n]`: each epoch is its own permutation of all samples, nothing is
dropped at its end, and a global batch may span two epochs.

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


def samples_at(seed: int, size: int, positions: Positions) -> Positions:
    """Sample numbers (int64, in [0, size)) at `positions` of a run over `size` samples."""
    out = np.empty_like(positions)
    epochs = positions // size
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        out[inside] = draws.permuted(seed, int(epoch), size, positions[inside] % size)
    return out


def micro_batches(position: int, layout: BatchLayout, rank: int, skipped: Skipped) -> Iterator[Positions]:
    """Endless micro batches of `rank`, starting with the step at `position`: int64 [micro] each."""
    while True:
        step, position = take(position, layout.total, skipped)
        yield from step.reshape(layout.accumulation, layout.ranks, layout.micro)[:, rank]
