"""Random numbers that are a pure function of (seed, purpose, position): no generator state to keep or restore.

Every random decision about the sample at a position in the run (which sample it is, its flip, timestep, label dropout
and noise) is computed from these, so neither the number of ranks and workers nor the micro batch can change it, and a
resumed run gets the random numbers that the uninterrupted one would have had.

Noise, of which a sample takes many numbers, is drawn on the device with the sample's 64 bits as its key
(`megapix.diffusion.noise`).

The mixing function is the finaliser of SplitMix64 (Steele et al. 2014), applied to seed, purpose and position in turn.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD = 2**64


class Purpose(IntEnum):
    """What a random number is for; purposes are independent of each other. Values are frozen: they define runs."""

    ORDER = 1
    FLIP = 2
    TIMESTEP = 3
    LABEL_DROPOUT = 4
    NOISE = 5
    SAMPLE_NOISE = 6
    REPLACEMENT = 7
    BUCKET = 8
    VALIDATION_NOISE = 9
    CAPTION = 10
    """Which caption of a sample is shown."""
    SET = 11
    """The order of a set of a mix."""


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(seed: int, purpose: Purpose, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each position: uint64 of the positions' shape."""
    key = _mix(np.array([seed % _WORD], np.uint64) + _GOLDEN)
    key = _mix(key + np.array([purpose], np.uint64) * _GOLDEN)
    return _mix(key + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniform(seed: int, purpose: Purpose, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in the open interval (0, 1), 53 bits, one for each position: float64."""
    return ((bits(seed, purpose, positions) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def permuted(seed: int, stream: int, size: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of `indices` under permutation number `stream` of range(size): int64 of the same shape.

    A six-round Feistel network on the smallest even number of bits that holds `size`, walked until the value falls
    inside the range: a bijection in constant memory, so the place of any index is found at once.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = bits(seed, Purpose.ORDER, np.arange(6, dtype=np.int64) + np.int64(6) * np.int64(stream))

    def encrypt(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for key in round_keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << half) | right

    out = encrypt(indices.astype(np.uint64))
    while (outside := out >= np.uint64(size)).any():
        out[outside] = encrypt(out[outside])
    return out.astype(np.int64)
