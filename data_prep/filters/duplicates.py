"""Which of many images are duplicates, from their fingerprints: a sample goes if an earlier one that stays is the same.

Near ones are found without comparing all pairs: of the bits cut into one band more than may differ, two hashes within
the threshold have at least one band in common (multi-index hashing), so only hashes that share a band are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_prep.filters.fingerprints import NEAR_BYTES
from data_prep.filters.rules import Duplicates

Hashes: TypeAlias = NDArray[np.uint64]
"""uint64 [N]."""
BITS = 8 * NEAR_BYTES
BLOCK = 4096
"""Hashes that are looked at together."""
PAIRS = 1 << 22
"""Pairs that are compared at a time, 8 bytes each; a few arrays of that length are alive."""


def duplicates_of(prints: NDArray[np.uint8], kind: Duplicates) -> NDArray[np.bool_]:
    """Whether each sample is a duplicate.

    Args:
        prints: fingerprints, uint8 [N, bytes], in the source's order.

    Returns:
        bool [N]; a function of the fingerprints and their order alone.
    """
    whole = np.ascontiguousarray(prints).view(f"V{prints.shape[1]}")[:, 0] if len(prints) else np.empty(0, "V1")
    found = np.ones(len(prints), np.bool_)
    _, first = np.unique(whole, return_index=True)  # the first of equals
    found[first] = False
    if kind.threshold:
        first.sort()
        hashes = np.ascontiguousarray(prints[first]).view(">u8")[:, 0].astype(np.uint64)
        found[first] = near(hashes, kind.threshold)
    return found


def near(hashes: Hashes, threshold: int) -> NDArray[np.bool_]:
    """Whether an earlier hash that stays differs from each in at most `threshold` bits; bool [N].

    Args:
        hashes: distinct ones.
    """
    taken = np.zeros(len(hashes), np.bool_)
    bands = _bands(threshold)
    stay: list[tuple[Hashes, NDArray[np.int64]]] = [(np.empty(0, np.uint64), np.empty(0, np.int64))] * len(bands)
    for start in range(0, len(hashes), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(hashes)))
        for (shift, mask), (keys, places) in zip(bands, stay, strict=True):
            for row, other in _pairs(_keys(hashes[rows], shift, mask), keys):
                close = _distances(hashes[rows[row]], hashes[places[other]]) <= threshold
                taken[rows[row[close]]] = True
            rows = rows[~taken[rows]]
        _within_block(hashes, rows, bands, threshold, taken)
        rows = rows[~taken[rows]]
        stay = [_merged(known, _keys(hashes[rows], *band), rows) for known, band in zip(stay, bands, strict=True)]
    return taken


def _within_block(
    hashes: Hashes, rows: NDArray[np.int64], bands: list[tuple[int, int]], threshold: int, taken: NDArray[np.bool_]
) -> None:
    """The same among the hashes of a block, in order: one that goes takes no other with it."""
    pairs = set[tuple[int, int]]()
    for shift, mask in bands:
        keys = _keys(hashes[rows], shift, mask)
        order = np.argsort(keys, kind="stable")
        for row, other in _pairs(keys, keys[order]):
            earlier = order[other]
            close = (earlier < row) & (_distances(hashes[rows[row]], hashes[rows[earlier]]) <= threshold)
            pairs.update(zip(row[close].tolist(), earlier[close].tolist(), strict=True))
    for late, early in sorted(pairs):
        taken[rows[late]] |= not taken[rows[early]]


def _bands(threshold: int) -> list[tuple[int, int]]:
    """(shift, mask) of `threshold` + 1 parts of the bits, as equal as can be."""
    edges = [BITS * band // (threshold + 1) for band in range(threshold + 2)]
    return [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]


def _keys(hashes: Hashes, shift: int, mask: int) -> Hashes:
    return (hashes >> np.uint64(shift)) & np.uint64(mask)


def _pairs(keys: Hashes, known: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places of equal values in `keys` and in `known`, which is sorted; in parts of about PAIRS."""
    low, high = np.searchsorted(known, keys, "left"), np.searchsorted(known, keys, "right")
    ends = np.cumsum(high - low)
    start = 0
    while start < len(keys):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PAIRS, "right")))
        counts = (high - low)[start:stop]
        rows = np.repeat(np.arange(start, stop), counts)
        within = np.arange(len(rows)) - np.repeat(ends[start:stop] - counts - before, counts)
        yield rows, np.repeat(low[start:stop], counts) + within
        start = stop


def _merged(
    known: tuple[Hashes, NDArray[np.int64]], keys: Hashes, rows: NDArray[np.int64]
) -> tuple[Hashes, NDArray[np.int64]]:
    order = np.argsort(keys, kind="stable")
    at = np.searchsorted(known[0], keys[order], "right")
    return np.insert(known[0], at, keys[order]), np.insert(known[1], at, rows[order])


def _distances(a: Hashes, b: Hashes) -> NDArray[np.uint8]:
    """Bits in which they differ."""
    differ = a ^ b
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(differ)  # type: ignore[no-any-return, unused-ignore]
    return np.unpackbits(differ.view(np.uint8).reshape(-1, NEAR_BYTES), axis=1).sum(axis=1, dtype=np.uint8)
