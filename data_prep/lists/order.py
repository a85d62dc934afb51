"""The order in which samples are laid into shards: that of a hash of seed and name, the same everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_prep.listing.base import Item
from megapix.errors import InputError

Places: TypeAlias = NDArray[np.int64]
"""int64 [n]: places in a list of samples."""
BLOCK = 1 << 16
"""Samples whose hashes are made together."""


class Order(NamedTuple):
    """What the order of samples follows from; 20 bytes each."""

    keys: NDArray[np.uint64]
    """uint64 [N, 2]: the first 16 bytes of each name's hash, most significant first."""
    chunks: NDArray[np.int32]
    """int32 [N]: the rank of each sample's chunk, by the hash of its name."""

    @staticmethod
    def of(items: Sequence[Item], seed: int) -> Order:
        """Look at all samples once."""
        keys, chunks = np.empty((len(items), 2), np.uint64), np.zeros(len(items), np.int32)
        numbers: dict[str, int] = {}
        block = bytearray()
        done = 0
        for n, item in enumerate(items):
            block += _hash(seed, item.name)
            chunks[n] = numbers.setdefault(item.chunk, len(numbers))
            if len(block) == 16 * BLOCK:
                keys[done : done + BLOCK] = np.frombuffer(block, ">u8").reshape(-1, 2)
                done, block = done + BLOCK, bytearray()
        keys[done:] = np.frombuffer(block, ">u8").reshape(-1, 2)
        if len(numbers) > 1:
            by_hash = sorted(numbers, key=lambda chunk: _hash(seed, chunk))
            ranks = np.empty(len(numbers), np.int32)
            ranks[[numbers[chunk] for chunk in by_hash]] = np.arange(len(numbers))
            chunks = ranks[chunks]
        return Order(keys, chunks)

    def shuffled(self, chosen: Places, shard: int) -> Places:
        """The chosen samples shuffled; where they lie in chunks, the chunks, and the samples of as many of them as fill
        a shard: a shard then reads from few."""
        of_chunks = self.chunks[chosen]
        by_chunk = chosen[np.argsort(of_chunks, kind="stable")]
        out: list[Places] = []
        start = end = 0
        for samples in np.bincount(of_chunks).tolist():
            end += samples
            if end - start >= shard:
                out.append(self._by_name(by_chunk[start:end]))
                start = end
        return np.concatenate([*out, self._by_name(by_chunk[start:])])

    def _by_name(self, places: Places) -> Places:
        return places[np.lexsort((self.keys[places, 1], self.keys[places, 0]))]


def check_unique(hashes: NDArray[np.int64], items: Sequence[Item]) -> None:
    """Check that no two samples have one name.

    Args:
        hashes: int64 [N], Python's hash of each name.

    Raises:
        InputError: naming the first that is there twice.
    """
    ordered = np.sort(hashes)
    alike = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen = set[str]()
    for item in items if alike else ():
        if hash(item.name) in alike:
            if item.name in seen:
                raise InputError(f"the source holds {item.name!r} twice; names must be unique")
            seen.add(item.name)


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}/{text}".encode()).digest()[:16]
